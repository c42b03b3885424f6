"""The process of an engine without a server: one JSON command a line in, one answer a line out. See ``deploy.bench.offline``."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams

from deploy.bench.offline import ANSWER

_RESET_TRIES, _RESET_SECONDS = 50, 0.2
_FIRST_TOKEN, _TOKENS = 100, 3900


def prompt(seed: int, tokens: int) -> list[int]:
    """Token ids that any vocabulary of more than 4,000 has; the same for the same seed, and longer ones begin with the shorter ones."""
    return [int(token) for token in _FIRST_TOKEN + np.random.default_rng(seed).integers(0, _TOKENS, tokens)]


def _empty_hbm(llm: LLM) -> bool:
    """Whether vLLM's own prefix cache is empty now; what still runs may hold blocks for a while."""
    for _ in range(_RESET_TRIES):
        if llm.reset_prefix_cache():
            return True
        time.sleep(_RESET_SECONDS)
    return False


def _ask(llm: LLM, seed: int, tokens: int, answer: int) -> dict[str, Any]:
    given: Any = [{"prompt_token_ids": prompt(seed, tokens)}]
    sampling = SamplingParams(max_tokens=answer, temperature=0, detokenize=False, ignore_eos=True)
    started = time.perf_counter()
    out = llm.generate(given, sampling, use_tqdm=False)[0]
    return {"seconds": time.perf_counter() - started, "token_ids": list(out.outputs[0].token_ids), "cached": out.num_cached_tokens}


def main() -> None:
    """Makes the engine that the first line describes, then answers the others."""
    llm = LLM(**json.loads(sys.stdin.readline()))
    _say({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        _say({"empty": _empty_hbm(llm)} if command == "empty" else _ask(llm, **command))


def _say(answer: dict[str, Any]) -> None:
    print(f"\n{ANSWER}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
