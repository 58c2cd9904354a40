"""Asks vLLM about one model, as one JSON file says: python -I vllm_job.py JOB.json

Run by the Python of export.engine_python, so that it imports nothing of qft. The job's fields are those of `Question`
of qft/serving/vllm.py and `report`, a JSON file to write:

    version               vLLM's
    seconds_to_start      until it can be asked
    vocabulary            rows of the embeddings, as vLLM has them
    ends                  ids at which it ends an answer by itself
    token_ids             of each text, without special tokens around it
    bos_count             BOS that it puts before a question, where there are messages
    chat                  ids of the messages as it renders them; null: there are none
    log_probs             of each row, of each scored place: ids and their log probabilities, the taught token's first
    answers               ids of each continuation
    generated_per_second  tokens, of all continuations at once
    error                 with the version alone: why it does not load or run the model
"""

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import vllm
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(path: str) -> None:
    job = json.loads(Path(path).read_text("utf-8"))
    try:
        report = asked(job)
    except Exception as error:  # whatever it has against the model
        traceback.print_exc()
        report = {"error": _reason(error), "version": vllm.__version__}
    Path(job["report"]).write_text(json.dumps(report), "utf-8")


def asked(job: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    llm = loaded(job)
    seconds = time.monotonic() - started
    adapter = LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None
    rows = read(llm, job, adapter)
    answers, speed = continued(llm, job, adapter)
    return {
        "version": vllm.__version__,
        "seconds_to_start": seconds,
        "vocabulary": llm.llm_engine.model_config.get_vocab_size(),
        "ends": ends(llm),
        "log_probs": [
            [told(out.prompt_logprobs[at], row[at]) for at in places]
            for out, row, places in zip(rows, job["rows"], job["scored"], strict=True)
        ],
        "answers": answers,
        "generated_per_second": speed,
        **words(llm, job),
    }


def loaded(job: dict[str, Any]) -> LLM:
    lora = {"enable_lora": True, "max_lora_rank": job["rank"], "max_loras": 1} if job["adapter"] else {}
    return LLM(
        model=job["model"],
        tokenizer=job["tokenizer"],
        dtype=job["dtype"],
        trust_remote_code=job["trust_remote_code"],
        max_model_len=job["max_length"],
        max_logprobs=job["likeliest"],
        seed=job["seed"],
        enforce_eager=True,  # what is compiled first pays off in hours, not in a gate
        enable_prefix_caching=False,
        **lora,
    )


def read(llm: LLM, job: dict[str, Any], adapter: LoRARequest | None) -> list[Any]:
    """Each row, with the log probabilities of its tokens."""
    reads = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=job["likeliest"], detokenize=False)
    prompts = [{"prompt_token_ids": row} for row in job["rows"]]
    # With an adapter, 0.32 on a CPU takes the head's rows for one a request, and fails where several are read at once.
    at_once = [[prompt] for prompt in prompts] if adapter else [prompts]
    return [out for some in at_once for out in llm.generate(some, reads, lora_request=adapter, use_tqdm=False)]


def told(found: dict[int, Any], taught: int) -> dict[str, Any]:
    """Of one place: the taught token first, then the likeliest."""
    ids = [taught, *(token for token in found if token != taught)]
    return {"ids": ids, "log_probs": [found[token].logprob for token in ids]}


def continued(llm: LLM, job: dict[str, Any], adapter: LoRARequest | None) -> tuple[list[list[int]], float | None]:
    """Greedy, up to the token that ends it, which is left out; and how many a second. None: nothing was."""
    if not job["prompts"]:
        return [], None
    stops = sorted({*job["stops"], *ends(llm)})
    greedy = SamplingParams(max_tokens=job["new_tokens"], temperature=0, stop_token_ids=stops, detokenize=False)
    started = time.monotonic()
    outs = llm.generate(
        [{"prompt_token_ids": ids} for ids in job["prompts"]], greedy, lora_request=adapter, use_tqdm=False
    )
    seconds = time.monotonic() - started
    given = [list(out.outputs[0].token_ids) for out in outs]
    return [_until(ids, stops) for ids in given], sum(map(len, given)) / seconds


def words(llm: LLM, job: dict[str, Any]) -> dict[str, Any]:
    """What it makes of texts, by the way that its own requests go."""
    tokenizer, one = llm.get_tokenizer(), SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    chat, count, bos = None, None, tokenizer.bos_token_id
    if job["messages"]:
        [out] = llm.chat([job["messages"]], one, use_tqdm=False)
        chat = list(out.prompt_token_ids)
        [out] = llm.generate([job["messages"][0]["content"]], one, use_tqdm=False)
        count = 0 if bos is None else list(out.prompt_token_ids).count(bos)
    ids = [list(tokenizer.encode(text, add_special_tokens=False)) for text in job["texts"]]
    return {"token_ids": ids, "chat": chat, "bos_count": count}


def ends(llm: LLM) -> list[int]:
    """The tokenizer's, and the model's."""
    config = llm.llm_engine.model_config.try_get_generation_config()
    own = config.get("eos_token_id")
    listed = own if isinstance(own, list) else [own]
    return sorted({end for end in [llm.get_tokenizer().eos_token_id, *listed] if end is not None})


def _until(ids: list[int], stops: list[int]) -> list[int]:
    return next((ids[:at] for at, token in enumerate(ids) if token in stops), ids)


def _reason(error: BaseException) -> str:
    """The first line of the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


if __name__ == "__main__":
    main(sys.argv[1])
