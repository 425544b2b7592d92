"""lm-eval's log-likelihoods of a local task, by its `hf` model and by a server's /v1/completions.

Arguments: URL, the served name, the checkpoint's folder, a folder for the task. The last line is one JSON:
each document's samples by the one and by the other.
"""

import json
import os
import sys
from pathlib import Path

sys.path.append(os.environ["PROJECT_PACKAGES"])  # torch and transformers, which this venv must not have twice

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

url, name, checkpoint, folder = sys.argv[1:]
DOCUMENTS = [
    {"question": "The sky is", "choices": [" blue", " made of cheese", " 7"], "answer": 0},
    {"question": "Ümlaut 漢字 and", "choices": [" 😎", " é", "plain"], "answer": 1},
    {
        "question": "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17",
        "choices": [" 18", " 1", " eighteen"],
        "answer": 0,
    },
    {"question": "a", "choices": ["b", "c" * 40, "\n"], "answer": 2},
]
documents = Path(folder) / "documents.jsonl"
documents.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
TASK = {
    "task": "local",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(documents)}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}


def samples(model: object) -> list[list[object]]:
    """Each document's log-likelihoods, and whether each continuation is the greedy one."""
    result = lm_eval.simple_evaluate(
        model, tasks=[TASK], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    ordered = sorted(result["samples"]["local"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in ordered]


torch.set_num_threads(1)
server = LocalCompletionsAPI(
    base_url=url + "/v1/completions",
    model=name,
    tokenizer=checkpoint,
    tokenizer_backend="huggingface",
    num_concurrent=1,
    max_retries=1,
    batch_size=2,
)
reference = HFLM(pretrained=checkpoint, dtype="float32", device="cpu", batch_size=1)
print(json.dumps({"server": samples(server), "reference": samples(reference)}))
