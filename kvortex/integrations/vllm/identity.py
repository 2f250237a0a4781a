"""Which model vLLM has loaded, and how: the name under which blocks outlive the process."""

import copy
import glob
import hashlib
import json
import operator
import os

import huggingface_hub
import vllm
from vllm import envs
from vllm.config.utils import normalize_value
from vllm.v1.core import kv_cache_utils

from kvortex import ConfigError

SAMPLE_BYTES, NUM_SAMPLES = 4096, 64
MOST_HEADER_BYTES = 100_000_000  # as safetensors has it
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
FROM_THE_FOLDER = {  # load formats of vLLM that read the weights from the model's own folder
    "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "pt", "npcache", "gguf", "bitsandbytes",
    "runai_streamer", "runai_streamer_sharded", "sharded_state",
}  # fmt: skip
# Fields that vLLM's own digests cover though they change no KV. Fields that no vLLM here has yet stay in the digest, as
# they should: a namespace too many costs a cold start, one too few serves KV of another model.
CHANGE_NO_KV = {
    "hf_config", "hf_text_config",  # stand in `model_facts`, without paths
    "model", "model_weights", "revision", "code_revision", "max_model_len", "trust_remote_code", "max_logprobs",
    "generation_config", "override_generation_config", "enable_sleep_mode",
    "cpu_offload_gb", "kv_cache_memory_bytes", "kv_offloading_size", "kv_offloading_backend",
}  # fmt: skip
OF_NO_FILE = {"_name_or_path", "auto_map", "transformers_version"}  # these say who read a configuration, and where
SPLITS = (
    "tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size",
    "cp_kv_cache_interleave_size", "dcp_kv_cache_interleave_size",
)  # fmt: skip
NAME_IT = 'set "namespace" in kv_connector_extra_config to a name that you change with the weights'


def require_stable_hashes(vllm_config):
    """Refuse block hashes that another process would compute differently from the same tokens.

    Raises
    ------
    ConfigError
        vLLM starts the hashes from random bytes. The message has the line that helps.
    """
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if "PYTHONHASHSEED" in os.environ:
        return
    fixed_seed = hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED")
    if fixed_seed and algorithm.startswith("sha256"):
        return
    raise ConfigError(
        f"vLLM {vllm.__version__} starts block hashes ({algorithm}) from random bytes, so that after a restart no "
        "block would be found again; start vLLM with PYTHONHASHSEED=0 in its environment (any number, the same one "
        "each time)" + (", or with --prefix-caching-hash-algo sha256" if fixed_seed else "")
    )


def namespace_of(vllm_config, *, name=None):
    """Digest of everything that decides the bytes of a KV block, except its tokens and their place in it.

    Equal servers have equal digests, whenever, wherever and from whichever folder they run. Call this when the model
    is loaded: some models change their configuration then.

    Parameters
    ----------
    vllm_config : VllmConfig
    name : str, optional
        Names the weights, instead of a digest of their files. The configuration is in the digest all the same.

    Returns
    -------
    bytes
        32 of them.

    Raises
    ------
    ConfigError
        Block hashes are not stable, KV scales belong to this process, or, without a name, the files of the weights
        are not known or cannot be read.

    Notes
    -----
    Adapters (LoRA) are not in it, because block hashes name them: before vLLM 0.32 by name alone, later by path too.
    """
    require_stable_hashes(vllm_config)
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    if getattr(cache, "calculate_kv_scales", False):
        raise ConfigError(
            "calculate_kv_scales takes the scales of the KV cache from the first tokens that this process sees, so "
            "that no other process can read its blocks; start vLLM without it, or leave out disk_path"
        )
    speculative = vllm_config.speculative_config
    draft = speculative and speculative.draft_model_config
    if draft and model_facts(draft) == model_facts(model):  # vLLM has no draft model then
        draft = None
    facts = {
        "version": 1,
        "vllm": vllm.__version__,
        "device": vllm_config.device_config.device_type,
        # What the scheduler makes its NONE_HASH of; workers do not have that hash.
        "hashes": [cache.prefix_caching_hash_algo,
                   os.environ.get("PYTHONHASHSEED", getattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", None))],
        "model": model_facts(model),
        "cache": own_digest(cache),
        "attention": own_digest(vllm_config.attention_config),
        "split": [*(getattr(parallel, field, 1) for field in SPLITS), envs.VLLM_PP_LAYER_PARTITION],
        "draft": draft and [model_facts(draft), speculative.method, speculative.draft_tensor_parallel_size],
        "weights": {"name": name},
    }  # fmt: skip
    if name is None:
        facts["weights"] = [weights_of(model, vllm_config.load_config)]
        if draft and (draft.model, draft.revision) != (model.model, model.revision):
            load = getattr(speculative, "draft_load_config", None) or vllm_config.load_config
            facts["weights"].append(weights_of(draft, load))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def model_facts(model):
    """What vLLM's `ModelConfig` says about the model, without paths."""
    configs = [normalize_value(without_paths(config.to_dict())) for config in (model.hf_config, model.hf_text_config)]
    seen = [getattr(model.multimodal_config, field, None) for field in ("mm_processor_kwargs", "video_pruning_rate")]
    # Only this kind of rotary embedding depends on the longest request that is allowed.
    longest = model.max_model_len if "longrope" in str(configs) else None
    return [own_digest(model), configs, normalize_value(seen), longest]


def own_digest(config):
    """The digest that vLLM makes of one of its configurations, without the fields that change no KV."""
    config = copy.copy(config)
    vars(config).update(dict.fromkeys(CHANGE_NO_KV & vars(config).keys()))
    return config.compute_hash()


def without_paths(value):
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items() if key not in OF_NO_FILE}
    return [without_paths(inner) for inner in value] if isinstance(value, list | tuple) else value


# ---- weights ---------------------------------------------------------------------------------------------------------


def weights_of(model, load):
    """What identifies the weights: "dummy" for vLLM's dummies, otherwise a digest of their files."""
    if load.load_format == "dummy":  # from one seed that vLLM fixes
        return "dummy"
    where = getattr(model, "model_weights", "") or model.model
    try:
        folder = os.path.dirname(where) if os.path.isfile(where) else folder_of(where, model.revision, load)
        digests = files_digest(folder) if folder and load.load_format in FROM_THE_FOLDER else None
    except OSError as error:
        raise ConfigError(f"the weights of {where} cannot be read ({error}); mend that, or {NAME_IT}") from error
    if digests is None:
        raise ConfigError(
            f"load_format {load.load_format!r} of {where} leaves no files here by which its weights could be "
            f"recognised; {NAME_IT}"
        )
    return [os.path.basename(where) if os.path.isfile(where) else "", digests]  # one GGUF of several in a folder


def folder_of(where, revision, load):
    """The folder of a model that vLLM has loaded, or None if this machine's cache of the hub does not have it."""
    if os.path.isdir(where):
        return where
    if envs.VLLM_USE_MODELSCOPE:  # the hub asked below may have another model of that name
        return None
    try:
        return huggingface_hub.snapshot_download(
            where, revision=revision, cache_dir=load.download_dir, local_files_only=True
        )
    except (OSError, ValueError):
        return None


def files_digest(folder):
    """Digest over the files of weights in a folder and the folders below it; None if there are none.

    The names relative to the folder count, and the sizes: vLLM chooses files by their names. Links are followed,
    hidden folders are not entered. If two files differ only outside the samples, their digests are equal.
    """
    names = sorted(
        name
        for name in glob.glob("**", root_dir=folder, recursive=True)
        if name.endswith(WEIGHT_FILES) and os.path.isfile(os.path.join(folder, name))
    )
    lines = [[name, *file_digest(os.path.join(folder, name))] for name in names]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest() if lines else None


def file_digest(path):
    """Size and digest of a file: of the start of each tensor if the file says where tensors are, else of 64 places."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        starts = path.endswith(".safetensors") and tensor_starts(file.fileno(), size)
        if starts:
            digest.update(os.pread(file.fileno(), starts[0], 0))  # the header: names, types and shapes
        last = max(0, size - SAMPLE_BYTES)
        for start in starts or [last * at // (NUM_SAMPLES - 1) for at in range(NUM_SAMPLES)]:
            digest.update(os.pread(file.fileno(), SAMPLE_BYTES, start))
    return size, digest.hexdigest()


def tensor_starts(fd, size):
    """Where the tensors of a safetensors file start; [] if its header is damaged (vLLM refuses to load it)."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if length > min(size - 8, MOST_HEADER_BYTES):
        return []
    try:
        header = json.loads(os.pread(fd, length, 8))
        header.pop("__metadata__", None)
        starts = sorted(operator.index(entry["data_offsets"][0]) for entry in header.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return []
    return [8 + length + start for start in starts] if starts and starts[0] == 0 and starts[-1] <= size else []
