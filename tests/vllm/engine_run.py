#!/usr/bin/env python3
"""One scenario in a real vLLM engine with random weights and token-id prompts, on a GPU where torch finds one.

    python tests/vllm/engine_run.py stress --size small --concurrency 64 --seconds 120 --graphs --verify
    python tests/vllm/engine_run.py stress --size heavy --short 0.9 --busy-link --device-gib 2 --host-gib 16 --verify
    python tests/vllm/engine_run.py throughput decode --size 8b --shared 0 80 --device-gib 16 --host-gib 40
    python tests/vllm/engine_run.py first_token --size 8b --prompt-tokens 16384 32768 --device-gib 10 --host-gib 16

Each scenario is a function of engine_scenarios.py or engine_numbers.py, with what it shows. It prints one line of JSON,
the last of stdout, and exits with 0 whatever it found: to judge is the caller's part, but for what would make the
numbers worthless, which is asserted.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import zlib
from pathlib import Path

import engine_numbers
import engine_scenarios

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

SIZES = {  # layers, heads, KV heads, head size, hidden, intermediate, vocabulary
    "8b": (32, 32, 8, 128, 4096, 14336, 128256),
    "3b": (28, 24, 8, 128, 3072, 8192, 128256),
    "small": (8, 16, 8, 128, 2048, 5632, 32000),
    "tiny": (2, 4, 2, 128, 512, 1024, 1024),
    "mla": (2, 4, 4, 128, 256, 512, 1024),  # of a DeepSeek, with the latent size that vLLM's CPU kernel knows
    "gemma": (12, 8, 8, 128, 1024, 2048, 32000),  # a Gemma 3: five KV cache groups with windows, one of full attention
    "gemma4": (6, 4, 2, 64, 256, 256, 1024),  # a Gemma 4: full attention has half as many heads, of twice the size
    "heavy": (16, 32, 32, 128, 512, 512, 1024),  # 4 MiB a block for little work: with --short 0.9 the link is behind
}
LATENT, ROTARY = 512, 64  # what MLA keeps of a token
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process, where its parts can be reached
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # models so small are faster alone: threads that wait for each other spin
}
GIB = 1 << 30


# ---- the engine ------------------------------------------------------------------------------------------------------


def write_model(folder, size, *, with_weights):
    """A Llama of this shape, or a DeepSeek without experts. Weights of our own make attention sharp, so that tokens
    depend on single blocks of the KV cache; vLLM's dummy weights hardly do.
    """
    layers, heads, kv_heads, head_size, hidden, intermediate, vocabulary = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "head_dim": head_size, "hidden_act": "silu", "hidden_size": hidden,
        "initializer_range": 0.02, "intermediate_size": intermediate, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
        "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": vocabulary,
    }  # fmt: skip
    if size == "mla":
        config |= {
            "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": LATENT,
            "q_lora_rank": None, "qk_nope_head_dim": head_size, "qk_rope_head_dim": ROTARY, "v_head_dim": head_size,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64,
            "moe_layer_freq": 1, "first_k_dense_replace": layers,
        }  # fmt: skip
        del config["head_dim"]
    if size == "gemma":
        config |= {
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 256, "query_pre_attn_scalar": head_size,
            "rope_local_base_freq": 10000.0,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * (layers // 6),
        }  # fmt: skip
    if size == "gemma4":
        config |= {
            "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 128, "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": vocabulary, "attention_k_eq_v": True, "global_head_dim": 2 * head_size,
            "num_global_key_value_heads": kv_heads // 2, "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        }  # fmt: skip
        del config["rope_theta"], config["rope_scaling"]
    Path(folder, "config.json").write_text(json.dumps(config))
    if not with_weights:
        return
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def random_weight(rows, columns, deviation):
        return torch.randn(rows, columns, generator=generator) * deviation

    queries, keys = heads * head_size, kv_heads * head_size
    even = hidden**-0.5
    attention = {  # rows, columns, deviation
        "q_proj": (queries, hidden, 2 * even),
        "k_proj": (keys, hidden, 2 * even),
        "v_proj": (keys, hidden, even),
        "o_proj": (hidden, queries, even),
    }
    if size == "mla":
        attention = {
            "q_proj": (heads * (head_size + ROTARY), hidden, 2 * even),
            "kv_a_proj_with_mqa": (LATENT + ROTARY, hidden, 2 * even),
            "kv_b_proj": (2 * queries, LATENT, LATENT**-0.5),
            "o_proj": (hidden, queries, even),
        }
    weights = {
        "model.embed_tokens.weight": random_weight(vocabulary, hidden, even),
        "lm_head.weight": random_weight(vocabulary, hidden, even),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(layers):
        weights |= {
            f"model.layers.{layer}.{name}": weight
            for name, weight in {
                **{f"self_attn.{part}.weight": random_weight(*shape) for part, shape in attention.items()},
                "mlp.gate_proj.weight": random_weight(intermediate, hidden, even),
                "mlp.up_proj.weight": random_weight(intermediate, hidden, even),
                "mlp.down_proj.weight": random_weight(hidden, intermediate, even),
                "input_layernorm.weight": torch.ones(hidden),
                "post_attention_layernorm.weight": torch.ones(hidden),
            }.items()
        }
        if size == "mla":
            weights[f"model.layers.{layer}.self_attn.kv_a_layernorm.weight"] = torch.ones(LATENT)
    save_file(weights, Path(folder, "model.safetensors"))


def kv_transfer_config(args):
    """What a user passes as ``--kv-transfer-config``; None without offloading."""
    host_bytes = int(args.host_gib * GIB)
    if args.mode == "none":
        return None
    if args.mode in ("native", "simple"):
        name = {"native": "OffloadingConnector", "simple": "SimpleCPUOffloadConnector"}[args.mode]
        return {
            "kv_connector": name,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": host_bytes, **args.extra},
        }
    extra = {"cpu_pool_size_bytes": host_bytes, "load_async": args.load == "async", "verify": args.verify, **args.extra}
    config = {"kv_connector": "KVortexConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    if not args.by_name:
        config["kv_connector_module_path"] = "kvortex.integrations.vllm"
    if args.other:
        other = {"kv_connector": "EngineOther", "kv_connector_module_path": "engine_other", "kv_role": "kv_both"}
        connectors = [other, config] if args.other == "first" else [config, other]
        extra = {"connectors": connectors}
        config = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return config


def stand_in_for_kernels():
    """Whether this vLLM's CPU kernels need stand-ins, which are then in place."""
    import vllm

    needed = vllm.__version__.startswith("0.15.")
    if needed:
        import shim015  # noqa: F401
    return needed


def flatten_rotary_queries():
    """Mend vLLM 0.32 on the CPU: what its rotary embedding makes of a token in queries of shape (tokens, heads, size)
    depends on the other tokens of the step. In (tokens, heads * size) it does not.
    """
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    original = RotaryEmbedding.forward_cpu

    def forward_cpu(self, positions, query, key=None):
        flat = [part if part is None else part.reshape(part.shape[0], -1) for part in (query, key)]
        turned = original(self, positions, *flat)
        return tuple(
            None if part is None else part.view(shaped.shape) for part, shaped in zip(turned, (query, key), strict=True)
        )

    RotaryEmbedding.forward_cpu = forward_cpu


class Engine:
    """vLLM's `LLM` with its parts in reach, and sums of what the connector counted."""

    def __init__(self, args, *, max_model_len, max_num_seqs):
        import torch
        import vllm

        self.on_gpu = torch.cuda.is_available()
        self.version = vllm.__version__
        self.device = torch.cuda.get_device_name(0) if self.on_gpu else "cpu"
        self.vocabulary = SIZES[args.size][-1]
        options = {
            "skip_tokenizer_init": True,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": args.batched,
            "enable_prefix_caching": True,
            "enforce_eager": not args.graphs,
            "seed": 0,
            "disable_log_stats": True,
        }
        if args.device_blocks:
            options["num_gpu_blocks_override"] = args.device_blocks
        if self.on_gpu:
            options |= {
                "dtype": "bfloat16",
                "load_format": "dummy",
                "kv_cache_memory_bytes": int(args.device_gib * GIB),
                "disable_custom_all_reduce": True,
                "gpu_memory_utilization": 0.3,  # only a check at the start, which several runs on a GPU should pass
            }
            if args.graphs:  # of decode steps, without the minutes of torch.compile
                options["compilation_config"] = {
                    "mode": 0,
                    "cudagraph_mode": "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
                }
        else:
            options |= {"dtype": "float32", "block_size": 32}  # what the CPU kernels of late versions demand
            if stand_in_for_kernels():
                options |= {"block_size": 16, "compilation_config": {"custom_ops": ["none"], "mode": 0}}
        if args.size == "mla" and not self.on_gpu:
            flatten_rotary_queries()
            options["block_size"] = 16
        options |= args.options
        if args.block_size:
            options["block_size"] = args.block_size
        config = kv_transfer_config(args)
        self.offloads = config is not None
        if self.offloads:
            options["kv_transfer_config"] = config
        if args.mutant:
            import faults

            faults.plant(args.mutant)
        self.folder = tempfile.TemporaryDirectory(prefix="kvortex-model-")
        model = args.model or self.folder.name
        if not args.model:
            write_model(model, args.size, with_weights=not self.on_gpu)
        self.faulty_disk = self.make_faulty_disk() if args.disk_fault else None
        self.connector_seconds = 0.0
        if args.mode == "custom":
            self.time_connector()
        began = time.perf_counter()
        self.llm = vllm.LLM(model=model, **options)
        self.start_seconds = time.perf_counter() - began
        self.counted, self.preemptions, self.saved_slots = {}, 0, []
        self.core = getattr(self.llm.llm_engine.engine_core, "engine_core", None)  # None: in another process
        self.scheduler_half = self.worker_half = None
        if self.core is not None:
            self.count_preemptions()
            if args.mode == "custom":
                self.find_halves()

    def make_faulty_disk(self):
        """System calls of which some will misbehave; every disk tier gets them."""
        sys.path.append(str(HERE.parent / "tiers"))
        from faulty_calls import FaultyCalls, build

        from kvortex.tiers.disk import segments
        from kvortex.tiers.disk._io_calls import IoCalls

        faulty = FaultyCalls(build(self.folder.name))
        faulty.mend()
        segments.IoCalls = lambda: IoCalls(faulty.address)
        return faulty

    def time_connector(self):
        """Add up what the connector's constructors and its `register_kv_caches` take of the start."""
        from kvortex.integrations.vllm import KVortexConnector

        def timed(method):
            def call(*args, **kwargs):
                began = time.perf_counter()
                try:
                    return method(*args, **kwargs)
                finally:
                    self.connector_seconds += time.perf_counter() - began

            return call

        for name in ("__init__", "register_kv_caches", "register_cross_layers_kv_cache"):
            if hasattr(KVortexConnector, name):
                setattr(KVortexConnector, name, timed(getattr(KVortexConnector, name)))

    def count_preemptions(self):
        scheduler = self.core.scheduler
        original = scheduler._preempt_request

        def preempt(*args, **kwargs):
            self.preemptions += 1
            return original(*args, **kwargs)

        scheduler._preempt_request = preempt

    def find_halves(self):
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        def ours(connector):
            return next(one for one in getattr(connector, "_connectors", [connector]) if hasattr(one, "worker"))

        self.scheduler_half = ours(self.core.scheduler.connector).scheduler
        self.worker_half = ours(get_kv_transfer_group()).worker
        count, submit = self.worker_half.count, self.worker_half.submit

        def count_here_too(**amounts):
            for name, amount in amounts.items():
                self.counted[name] = self.counted.get(name, 0) + amount
            count(**amounts)

        def note_slots(queue, transfer, stream):
            if queue is self.worker_half.saver:
                self.saved_slots += transfer.slots.tolist()
            return submit(queue, transfer, stream)

        self.worker_half.count, self.worker_half.submit = count_here_too, note_slots

    def sampling(self, max_tokens):
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)

    def add(self, name, prompt, max_tokens):
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, self.sampling(max_tokens))

    def generate(self, prompts, max_tokens):
        """Tokens of each prompt, and how many of the prompt's were not computed."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], self.sampling(max_tokens), use_tqdm=False
        )
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
        }

    def settle(self):
        """Let every save land and be known: what ended is only told in a later step."""
        for attempt in range(100 if self.tier is None else 2000):
            self.generate([[5, 6, 7]], 4)
            if self.scheduler_half is None:  # not in reach: a few steps are enough, and a little time
                if attempt == 3:
                    return
            elif not self.scheduler_half.in_flight and self.is_on_disk():
                return
            time.sleep(0.02)
        raise AssertionError(f"transfers that do not end: {self.scheduler_half.in_flight}")

    @property
    def tier(self):
        """The scheduler's view of a disk, or None."""
        return self.scheduler_half and self.scheduler_half.tier

    def is_on_disk(self):
        """Whether all of the pool that is to go to disk is there; where everything may be written, all of it is."""
        if self.tier is None:
            return True
        index = self.scheduler_half.index
        counts = index.counters()
        is_all = counts["num_clean"] == counts["num_ready"] or self.tier.budget.bytes_per_s
        return is_all and not self.tier.is_busy

    def fingerprint(self):
        """What this process computes before a block was moved: its weights, and the odds of a few tokens. Two engines
        that differ in it yield other tokens whatever a connector does.
        """
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=1)
        output = self.llm.generate([{"prompt_token_ids": [5, 6, 7]}], greedy, use_tqdm=False)[0].outputs[0]
        odds = [odds[token].logprob for token, odds in zip(output.token_ids, output.logprobs, strict=True)]
        return {"weights": self.weights_crc(), "odds": odds}

    def weights_crc(self):
        """Of the weights in memory now, but for those that vLLM packed for its CPU kernels: the odds speak for them.
        None for an engine in another process.
        """
        if self.core is None:
            return None
        import torch

        crc = 0
        for _, weight in self.core.model_executor.driver_worker.worker.model_runner.model.named_parameters():
            crc = zlib.crc32(weight.detach().contiguous().view(torch.uint8).numpy().tobytes(), crc)
        return crc

    def wait_ready(self):
        """Until all host memory is pinned, which happens in the background; then no mode waits for it later."""
        if self.worker_half is not None:
            self.worker_half.pool.wait_ready()

    def forget(self, *, host=False):
        """Empty the device's prefix cache, so that what hits now comes from the host; or both."""
        for _ in range(100):
            self.settle()
            if self.llm.reset_prefix_cache(reset_connector=host and self.offloads):
                return
        raise AssertionError("vLLM does not reset its prefix cache")

    def scribble(self, slots):
        """Random numbers into these blocks in host memory."""
        import numpy as np

        rng = np.random.default_rng(0)
        for slot in slots:
            content = np.frombuffer(self.worker_half.pool.view(slot), dtype=np.float32)
            content[:] = rng.standard_normal(content.size, dtype=np.float32)

    def drain(self):
        """Wait for the copies that are under way, and judge them."""
        if self.worker_half is not None:
            deadline = time.monotonic() + 60
            while self.worker_half.running:
                assert time.monotonic() < deadline, f"transfers that do not end: {self.worker_half.running}"
                self.worker_half.drain()
                self.worker_half.collect(())
                time.sleep(0.001)

    def counters(self):
        """Sums since the start."""
        sums = {} if self.core is None else {"preemptions": self.preemptions}
        if self.worker_half is not None:
            sums |= {
                "blocks_saved": self.counted.get("save_blocks", 0),
                "blocks_loaded": self.counted.get("load_blocks", 0),
                "blocks_evicted": self.scheduler_half.index.counters()["evictions"],
                "saves_dropped": self.counted.get("saves_dropped", 0),
                "transfers_failed": self.counted.get("transfers_failed", 0),
                "verify_blocks": self.counted.get("verify_blocks", 0),
                "verify_mismatches": self.counted.get("verify_mismatches", 0),
                "verify_skipped": self.counted.get("verify_skipped", 0),
            }
            if self.tier is not None:
                sums |= self.tier.counters()
                sums["dirty_evictions"] = self.scheduler_half.index.counters()["dirty_evictions"]
        if "engine_other" in sys.modules:
            sums["blocks_of_other"] = sys.modules["engine_other"].NUM_LOADED
        return sums


NUMBERS = (engine_numbers.throughput, engine_numbers.first_token, engine_numbers.decode)
JUDGED = (
    engine_scenarios.stress,
    engine_scenarios.restore,
    engine_scenarios.overflow,
    engine_scenarios.again,
    engine_scenarios.leave,
    engine_scenarios.serve,
)
SCENARIOS = {scenario.__name__: scenario for scenario in (*NUMBERS, *JUDGED)}


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def arguments(command=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS, help="one after the other in one engine")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--size", default="tiny", choices=SIZES)
    engine.add_argument("--model", default="", help="a folder of write_model's, for several runs; a new one without")
    engine.add_argument("--mode", default="custom", choices=["none", "custom", "native", "simple"])
    engine.add_argument(
        "--runner", default="", choices=["", "v1", "v2"], help="vLLM's model runner; its choice without"
    )
    engine.add_argument("--load", default="async", choices=["async", "sync"])
    engine.add_argument("--extra", type=json.loads, default={}, help="more of kv_connector_extra_config, as JSON")
    engine.add_argument("--options", type=json.loads, default={}, help="more for vLLM's LLM, as JSON")
    engine.add_argument("--by-name", action="store_true", help="rely on the entry point, pass no module path")
    engine.add_argument("--other", default="", choices=["", "first", "last"], help="beside another connector")
    engine.add_argument("--verify", action="store_true")
    engine.add_argument("--mutant", default="", help="a fault to plant, see faults.py")
    engine.add_argument(
        "--disk-fault",
        default="",
        help="what each call to the disk does from the start on: hang, lie, short, EIO, ENOSPC",
    )
    engine.add_argument(
        "--late-us", type=int, default=0, help="on a CPU: copies start up to so much later, as behind others on a GPU"
    )
    engine.add_argument("--graphs", action="store_true", help="CUDA graphs for decode steps")
    engine.add_argument("--device-gib", type=float, default=1.0, help="KV cache on a GPU")
    engine.add_argument("--device-blocks", type=int, default=0, help="KV cache in blocks; for CPUs")
    engine.add_argument("--host-gib", type=float, default=4.0, help="host memory for KV blocks")
    engine.add_argument("--block-size", type=int, default=0, help="tokens a block; vLLM's choice without")
    engine.add_argument("--batched", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--end", default="", choices=["", "shutdown", "kill"], help="what vLLM's core does when it is told to end; or 9"
    )
    parser.add_argument(
        "--requests", type=int, default=0, help="stress: so many instead of --seconds; throughput: of 64"
    )
    group = parser.add_argument_group("stress")
    group.add_argument("--concurrency", type=int, default=64)
    group.add_argument("--seconds", type=float, default=60.0)
    group.add_argument("--prefixes", type=int, default=24, help="how many prefixes are shared")
    group.add_argument("--short", type=float, default=0.0, help="share of requests that get 1 to 3 tokens")
    group.add_argument("--scale", type=float, default=0, help="length of prompts; 1 on a GPU and 0.1 on a CPU without")
    group.add_argument("--distinct", type=int, default=0, help="draw from so many prompts, again and again")
    group.add_argument("--busy-link", action="store_true", help="on a GPU: other copies to the host all the while")
    group.add_argument("--abort-rate", type=float, default=0.05, help="aborts a step")
    group.add_argument("--tokens", action="store_true", help="print the tokens of every request")
    group = parser.add_argument_group("throughput, first_token, decode")
    group.add_argument("--prompt-tokens", type=int, nargs="+", default=[4096], help="first_token: several lengths")
    group.add_argument("--output-tokens", type=int, default=64)
    group.add_argument("--shared", type=int, nargs="+", default=[0], help="percents of a prompt that requests share")
    group.add_argument("--others", type=int, default=24, help="decode: requests that come, an even number")
    group.add_argument("--every", type=int, default=20, help="decode: steps between two of them")
    group.add_argument("--warmup", type=int, default=2)
    group.add_argument("--repeat", type=int, default=1)
    return parser.parse_args(command)


def main():
    args = arguments()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if args.runner:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = {"v1": "0", "v2": "1"}[args.runner]
    if set(args.scenarios) & {scenario.__name__ for scenario in NUMBERS}:
        args.requests = args.requests or 64
        most_tokens = max(*args.prompt_tokens, engine_numbers.DECODE_PROMPT + args.every * (args.others + 1))
        engine = Engine(args, max_model_len=most_tokens + args.output_tokens + 16, max_num_seqs=64)
    else:
        import torch

        max_model_len = 4096 if torch.cuda.is_available() else 384
        engine = Engine(args, max_model_len=max_model_len, max_num_seqs=min(64, args.concurrency))
    fingerprint = None if engine.on_gpu else engine.fingerprint()
    if args.late_us:
        from kvortex.driver import _host

        _host.set_delay_us(args.late_us // 2, args.late_us, args.seed)
    report = {
        "vllm": engine.version,
        "device": engine.device,
        "start_seconds": round(engine.start_seconds, 2),
        "connector_seconds": round(engine.connector_seconds, 3),
        **{name: getattr(args, name) for name in ("size", "mode", "runner", "load", "graphs", "mutant")},
    }
    if engine.worker_half is not None:
        rows = engine.worker_half.layout.planner
        report["planner"] = [f"{row.direction} {row.rows} x {row.piece_bytes} {row.backend}" for row in rows]
    if engine.faulty_disk is not None:
        engine.faulty_disk.plan("any", args.disk_fault)
    for name in args.scenarios:
        before = engine.counters()
        result = SCENARIOS[name](engine, args)
        sums = {counter: value - before[counter] for counter, value in engine.counters().items()}
        report[name] = {**sums, **result}
    if fingerprint is not None:
        report |= {"fingerprint": fingerprint, "weights_at_the_end": engine.weights_crc()}
    report["resident_gib"] = round(resident_bytes() / GIB, 3)
    if len(args.scenarios) == 1:  # one flat line, for tables
        report |= report.pop(name)
    print(json.dumps(report), flush=True)
    if engine.faulty_disk is not None:
        engine.faulty_disk.mend()
    if args.end == "shutdown":
        engine.core.shutdown()
    elif args.end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a process that vLLM spawned
    import torch

    if not torch.cuda.is_available():
        stand_in_for_kernels()
