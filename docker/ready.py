"""The health check of both images: exit status 0 when the server in this container answers 200 on /ready."""

import http.client  # not urllib: it would send a question to this very container through HTTP_PROXY
import os
import ssl
import sys

port = int(os.environ.get("RIVULET_PORT", "8000"))
connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)
if os.environ.get("RIVULET_TLS_CERTIFICATE"):  # which is for other names than this address
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=4, context=context)
try:
    connection.request("GET", "/ready")
    response = connection.getresponse()
    print(response.status, response.read(1000).decode(errors="replace"))
except OSError as error:
    sys.exit(f"no answer on /ready: {error}")
sys.exit(response.status != 200)
