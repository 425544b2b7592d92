"""The health check of both images: exit status 0 when the server in this container answers 200 on /ready."""

import http.client  # not urllib: it would send a question to this very container through HTTP_PROXY
import os
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("RIVULET_PORT", "8000")), timeout=4)
try:
    connection.request("GET", "/ready")
    response = connection.getresponse()
    print(response.status, response.read(1000).decode(errors="replace"))
except OSError as error:
    sys.exit(f"no answer on /ready: {error}")
sys.exit(response.status != 200)
