"""Greedy tokens of vLLM on a CPU when a prompt's KV comes back from the pool, beside those when it was just computed.

    build/codec/bin/python -m bench.codec.greedy FOLDER                    writes SmolLM2-135M there, and prompts
    .venv-vllm/0.32.0/bin/python -m bench.codec.greedy FOLDER --codec q8   asks vLLM, or "exact", the pool without one

The first is run in the environment that `make bench-codec` makes (CODEC in the Makefile), the second in one of `make
test-vllm`. One prompt at a time, so that all steps have one shape. Without a codec some tokens differ, too: the last
token of a prompt is computed alone, where it was one of a thousand before.
"""

import argparse
import json
import os
from itertools import islice
from pathlib import Path

MODEL, PREFIX, NUM_TOKENS, OF_A_KIND = "SmolLM2-135M", 1024, 64, 4


def write(folder):
    """The model in bfloat16, as vLLM reads it, and prompts of prose, code and chat."""
    from safetensors.torch import save_file

    from bench.codec.documents import TURNS, chats, code, load, prose

    tokenizer, model = load(MODEL)
    weights = {name: weight.bfloat16().contiguous() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    end = tokenizer("\n", add_special_tokens=False).input_ids
    prompts = []
    for texts in (prose(), code(), chats(*TURNS[MODEL])):
        for text in islice(texts, OF_A_KIND):
            prompts.append(tokenizer(text, add_special_tokens=False).input_ids[:PREFIX] + end)
    (folder / "prompts.json").write_text(json.dumps(prompts))


def ask(folder, codec):
    """For each prompt, how many tokens were the same before the first that was not."""
    import vllm

    extra = {"cpu_pool_size_bytes": 1 << 30, "codec": codec}
    connector = {"kv_connector": "KVortexConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    llm = vllm.LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=PREFIX + 2 * NUM_TOKENS,
        max_num_seqs=1,
        max_num_batched_tokens=2 * PREFIX,
        enforce_eager=True,
        block_size=32,
        seed=0,
        kv_transfer_config={**connector, "kv_connector_module_path": "kvortex.integrations.vllm"},
    )
    wanted = vllm.SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads((folder / "prompts.json").read_text())]
    computed, restored = [], []
    for answers in (computed, restored):
        for prompt in prompts:
            (output,) = llm.generate([prompt], wanted, use_tqdm=False)
            answers.append(output.outputs[0].token_ids)
            if (output.num_cached_tokens >= PREFIX) != (answers is restored):
                raise SystemExit(f"{output.num_cached_tokens} tokens of a prompt came from the pool")
        if not llm.reset_prefix_cache():
            raise SystemExit("vLLM did not reset its own cache")
    return [
        next((at for at, (one, other) in enumerate(zip(*both, strict=True)) if one != other), NUM_TOKENS)
        for both in zip(computed, restored, strict=True)
    ]


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.codec.greedy", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--codec", help="ask vLLM; without it, write the model")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.codec is None:
        write(args.folder)
        return
    os.environ |= {"PYTHONHASHSEED": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # threads that wait for others spin
    same = ask(args.folder, args.codec)
    print(f"{args.codec}: {same.count(NUM_TOKENS)} of {len(same)} prompts have the same {NUM_TOKENS} tokens; the first "
          f"that differs: {same}; same before it: {sum(same) / len(same):.0f} on average")  # fmt: skip


if __name__ == "__main__":
    main()
