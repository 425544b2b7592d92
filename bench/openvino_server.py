"""A minimal /v1/completions around openvino-genai, which has no server: streams, greedy, EOS ignored.

Run by a Python that has openvino-genai; needs nothing else. One thread steps the pipeline, each connection
waits for its tokens in a thread of its own. Bodies end with the connection.
"""

import argparse
import itertools
import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openvino_genai

END = None


class Pipeline:
    """The pipeline and the thread that alone touches it."""

    def __init__(self, model: str, threads: int, sequences: int, cache_tokens: int) -> None:
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.num_kv_blocks = -(-cache_tokens // 32) + 2 * sequences  # of 32 tokens on a CPU
        scheduling.max_num_seqs = sequences
        scheduling.max_num_batched_tokens = 512
        scheduling.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduling, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self.tokenizer = self._pipeline.get_tokenizer()
        self._arrivals: queue.Queue = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, prompt: str, tokens: int) -> tuple[int, queue.Queue]:
        """Tokens in, and a queue of the ids that come out; END is the last."""
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).input_ids
        outputs: queue.Queue = queue.Queue()
        self._arrivals.put((ids, tokens, outputs))
        return ids.shape[1], outputs

    def _run(self) -> None:
        running: dict = {}
        for number in itertools.count():
            while not running or not self._arrivals.empty():
                ids, tokens, outputs = self._arrivals.get()
                config = self._pipeline.get_config()
                config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
                name = number * 10_000 + len(running)
                running[name] = (self._pipeline.add_request(name, ids, config), outputs)
            self._pipeline.step()
            for name, (handle, outputs) in list(running.items()):
                if handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            outputs.put(token)
                        if output.finish_reason != openvino_genai.GenerationFinishReason.NONE:
                            outputs.put(END)
                            del running[name]


def make_handler(pipeline: Pipeline) -> type[BaseHTTPRequestHandler]:
    """What answers each connection."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._begin("application/json")
            self.wfile.write(b'{"data": [{"id": "openvino"}]}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            count, outputs = pipeline.submit(body["prompt"], body["max_tokens"])
            self._begin("text/event-stream")
            made = 0
            for token in iter(outputs.get, END):
                made += 1
                self._event({"choices": [{"index": 0, "text": pipeline.tokenizer.decode([token])}]})
            usage = {"prompt_tokens": count, "completion_tokens": made}
            self._event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": usage})

        def _begin(self, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()

        def _event(self, data: dict) -> None:
            self.wfile.write(b"data: %b\n\n" % json.dumps(data).encode())

        def log_message(self, *words: object) -> None:
            pass

    return Handler


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="GGUF file, or folder in OpenVINO's format")
    for option in ("--port", "--threads", "--sequences", "--cache-tokens"):
        parser.add_argument(option, type=int, required=True)
    given = parser.parse_args()
    served = Pipeline(given.model, given.threads, given.sequences, given.cache_tokens)
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", given.port), make_handler(served)).serve_forever()
