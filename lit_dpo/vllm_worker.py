"""What runs in vLLM's own process: `python -P vllm_worker.py READ WRITE`, which `vllm_engine.py` alone starts.

It is a process of its own, so that its end gives all of the GPU's memory back, and nothing that vLLM sets up reaches
the training. One line of JSON comes in for the model, then one for each batch of prompts; one goes out for each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any


def completions_of(llm: Any, make: Any, asked: dict[str, Any]) -> list[list[Any]]:
    """Ids of each completion, and whether the model ended it.

    Args:
        llm: `vllm.LLM`.
        make: `vllm.SamplingParams`.
        asked: `prompts`, `seeds` (one each), and `options` that all of them share.
    """
    options = asked["options"]
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    # A seed is ignored at temperature 0, and refused by some releases.
    seeds = [{"seed": seed} if options["temperature"] > 0 else {} for seed in asked["seeds"]]
    found = []
    for output in llm.generate(prompts, [make(**options, **seed, detokenize=False) for seed in seeds], use_tqdm=False):
        [said] = output.outputs
        ids, finished = [*said.token_ids], said.finish_reason == "stop"
        if finished and (not ids or ids[-1] not in options["stop_token_ids"]):  # whether it is kept has changed before
            ids.append(said.stop_reason if isinstance(said.stop_reason, int) else options["stop_token_ids"][0])
        found.append([ids, finished])
    return found


def follow(parent: int) -> None:
    """End with the process that asks, with all that vLLM has started, however that process ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)  # a group of its own, see `vllm_engine.py`


def main(read: int, write: int) -> None:
    """Answer until no more is asked.

    Args:
        read: File descriptor of what is asked.
        write: File descriptor of the answers.
    """
    if os.getpgrp() == os.getpid():
        threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
    with os.fdopen(read, encoding="utf-8") as asked, os.fdopen(write, "w", encoding="utf-8") as answered:
        try:
            from vllm import LLM, SamplingParams

            llm = LLM(**json.loads(asked.readline()))
            for line in asked:
                answered.write(
                    json.dumps({"completions": completions_of(llm, SamplingParams, json.loads(line))}) + "\n"
                )
                answered.flush()
        except Exception as error:
            answered.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            raise


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
