"""What tells one model from another across processes: the same name for the same KV, another for any other."""

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rig_cache import known
from safetensors.torch import load_file, save_file
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, SpeculativeConfig, VllmConfig
from vllm.utils import hashing
from vllm.v1.core import kv_cache_utils

from kvortex import ConfigError
from kvortex.integrations.vllm.identity import namespace_of, require_stable_hashes

TINY = Path(__file__).parent / "tiny"
FIXED_SEED = hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED")


def config_of(folder, **changes):
    """vLLM's configuration, with fields of its parts set late: not each version has each value on a CPU."""
    model = {"dtype": "float32", **{key: changes.pop(key) for key in ("dtype", "hf_overrides") if key in changes}}
    scheduling = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 512, "is_encoder_decoder": False}
    config = VllmConfig(
        model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, max_model_len=512, seed=0, **model),
        cache_config=CacheConfig(**known(CacheConfig, block_size=16)),
        scheduler_config=SchedulerConfig(**known(SchedulerConfig, **scheduling)),
        device_config=DeviceConfig("cpu"),
    )
    for name, value in changes.items():
        (part,) = (
            part
            for part in (config.model_config, config.cache_config, config.parallel_config, config.scheduler_config)
            if name in vars(part) and (part, name) != (config.scheduler_config, "max_model_len")
        )
        setattr(part, name, value)
    return config


def name_of(config, **options):
    return namespace_of(config, **options)


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")


@pytest.fixture(scope="module")
def weights():
    """Some start within the first 4 KiB of others, and the last is larger than two samples."""
    return {f"layers.{at}.weight": torch.full((16 + 2000 * at,), float(at)) for at in range(4)}


@pytest.fixture
def folder(tmp_path, weights):
    """A model in two files."""
    where = tmp_path / "model"
    shutil.copytree(TINY, where)
    names = sorted(weights)
    for at, part in enumerate((names[:2], names[2:])):
        save_file({name: weights[name] for name in part}, where / f"model-{at}.safetensors")
    return where


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    os.environ.setdefault("PYTHONHASHSEED", "0")
    return config_of(TINY)


@pytest.fixture
def config(template, folder):
    return at(template, folder)


def at(config, folder):
    """The same configuration of a model that lies elsewhere."""
    config = copy.deepcopy(config)
    config.model_config.model = str(folder)
    config.model_config.hf_config._name_or_path = str(folder)
    return config


def change(path, offset):
    """Turn one bit."""
    whole = bytearray(path.read_bytes())
    whole[offset] ^= 1
    path.write_bytes(whole)


def data_start(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


# ---- hashes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"])
def test_hashes_that_start_from_random_bytes_are_refused(monkeypatch, config, algorithm):
    """Whether they do is asked of vLLM: two processes, hence two calls, without a seed."""
    monkeypatch.delenv("PYTHONHASHSEED")
    config.cache_config.prefix_caching_hash_algo = algorithm
    monkeypatch.setattr(hashing, "_xxhash_digest", lambda data: hashlib.sha256(data).digest())  # xxhash may be lacking
    starts = set()
    for _ in range(2):
        kv_cache_utils.init_none_hash(hashing.get_hash_fn_by_name(algorithm))
        starts.add(kv_cache_utils.NONE_HASH)
    assert (len(starts) == 1) == (FIXED_SEED and algorithm.startswith("sha256"))
    if len(starts) == 1:
        require_stable_hashes(config)
        name_of(config)
        return
    for refused in (lambda: require_stable_hashes(config), lambda: name_of(config)):
        with pytest.raises(ConfigError, match="start vLLM with PYTHONHASHSEED=0") as raised:
            refused()
        assert ("--prefix-caching-hash-algo sha256" in str(raised.value)) == FIXED_SEED
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    require_stable_hashes(config)


def test_another_seed_or_algorithm_is_another_name(monkeypatch, config):
    names = {name_of(config)}
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    names.add(name_of(config))
    config.cache_config.prefix_caching_hash_algo = "sha256_cbor"
    names.add(name_of(config))
    assert len(names) == 3


# ---- configuration ---------------------------------------------------------------------------------------------------

CHILD = """
import json, sys
from test_identity import config_of, name_of
for arguments in json.loads(sys.argv[2]):
    print("name", name_of(config_of(sys.argv[1], **arguments)).hex(), flush=True)
"""
OTHER_KV = [
    {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"decode_context_parallel_size": 2},
    {"cache_dtype": "fp8_e5m2"}, {"block_size": 32}, {"dtype": "bfloat16"}, {"quantization": "fp8"},
    {"hf_overrides": {"rope_theta": 20000.0}},
]  # fmt: skip
SAME_KV = [
    {"max_model_len": 256}, {"max_num_seqs": 3}, {"max_num_batched_tokens": 1024}, {"seed": 7},
    {"served_model_name": "other"}, {"gpu_memory_utilization": 0.5}, {"enforce_eager": True}, {"max_logprobs": 3},
    {"generation_config": "vllm"}, {"data_parallel_size": 2}, {"num_gpu_blocks": 77},
]  # fmt: skip


def test_two_processes_agree_and_what_changes_kv_changes_the_name(monkeypatch, tmp_path, folder):
    """The other reads a copy; where vLLM's hashes need no seed, it has none, and orders its sets otherwise."""
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    if FIXED_SEED:
        monkeypatch.delenv("PYTHONHASHSEED")
    asked = [{}, *SAME_KV, *OTHER_KV]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "elsewhere" / "copy"), json.dumps(asked)], check=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)), cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    names = [name_of(config_of(folder, **arguments)).hex() for arguments in asked]
    assert [line.split()[1] for line in child.stdout.splitlines() if line.startswith("name ")] == names
    same, others = names[1 : 1 + len(SAME_KV)], names[1 + len(SAME_KV) :]
    assert [arguments for arguments, name in zip(SAME_KV, same, strict=True) if name != names[0]] == []
    assert len({names[0], *others}) == 1 + len(OTHER_KV), list(zip(OTHER_KV, others, strict=True))


def test_the_longest_request_counts_where_it_decides_the_rotation(config):
    names = set()
    for longest in (4096, 8192):
        config.model_config.max_model_len = longest
        names.add(name_of(config))
    assert len(names) == 1
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0], "long_factor": [2.0]}
    config.model_config.hf_config.rope_parameters = rope
    for longest in (4096, 8192):
        config.model_config.max_model_len = longest
        names.add(name_of(config))
    assert len(names) == 3


def test_scales_taken_from_the_first_tokens_are_refused(config):
    config.cache_config.calculate_kv_scales = True
    with pytest.raises(ConfigError, match="calculate_kv_scales"):
        name_of(config, name="mine")


def test_the_drafter_counts_with_its_weights(tmp_path, config, folder, weights):
    def speculate(**how):
        config.speculative_config = SpeculativeConfig(
            num_speculative_tokens=1, target_model_config=config.model_config,
            target_parallel_config=config.parallel_config, **how,
        )  # fmt: skip
        return name_of(config)

    drafter = tmp_path / "drafter"
    shutil.copytree(TINY, drafter)
    path = drafter / "model.safetensors"
    save_file(weights, path)
    alone = name_of(config)
    assert speculate(method="ngram", prompt_lookup_max=3) == alone  # has no KV
    drafted = speculate(method="eagle", model=str(drafter))
    shutil.copytree(drafter, tmp_path / "copy")
    assert speculate(method="eagle", model=str(tmp_path / "copy")) == drafted
    named = name_of(config, name="mine")
    change(path, data_start(path))
    tuned = speculate(method="eagle", model=str(drafter))
    assert len({alone, drafted, tuned}) == 3
    path.unlink()
    with pytest.raises(ConfigError, match=f'{drafter} .*set "namespace"'):
        name_of(config)
    assert name_of(config, name="mine") == named
    config.speculative_config = None
    assert name_of(config, name="mine") != named


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_the_same_files_elsewhere_have_the_same_name(tmp_path, config, folder):
    """Touched, copied, in a folder that is a link, or links themselves, as in the cache of the hub."""
    name = name_of(config)
    os.utime(folder / "model-0.safetensors", (1, 1))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "model.safetensors").write_bytes(b"half a download")
    (folder / "README.md").write_text("edited")
    assert name_of(config) == name
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for path in folder.glob("model-*"):
        blob = tmp_path / "blobs" / path.name[::-1]
        shutil.copy(path, blob)
        (tmp_path / "snapshot" / path.name).symlink_to(blob)
    for where in ("link", "snapshot"):
        assert name_of(at(config, tmp_path / where)) == name


def test_two_fine_tunes_of_one_shape_differ(tmp_path, config, folder):
    tuned = load_file(folder / "model-1.safetensors")
    tuned["layers.3.weight"] *= 1.5
    shutil.copytree(folder, tmp_path / "tuned")
    save_file(tuned, tmp_path / "tuned" / "model-1.safetensors")
    assert name_of(at(config, tmp_path / "tuned")) != name_of(config)


@pytest.mark.parametrize("change_it", [
    lambda path: change(path, data_start(path)), lambda path: change(path, data_start(path) + 4095),
    lambda path: path.rename(path.with_name("renamed.safetensors")),
    lambda path: path.write_bytes(path.read_bytes() + b"x"), lambda path: path.unlink(),
    lambda path: shutil.copy(path, path.with_suffix(".pt")), lambda path: change(path, 3),
], ids=["first byte", "last byte of the sample", "renamed", "longer", "lost", "one more", "header"])  # fmt: skip
def test_what_happens_to_one_file_is_noticed(config, folder, change_it):
    name = name_of(config)
    change_it(folder / "model-1.safetensors")
    assert name_of(config) != name


def test_each_tensor_has_a_sample(config, folder, weights):
    path = folder / "model-1.safetensors"
    header = json.loads(path.read_bytes()[8 : data_start(path)])
    names = {name_of(config)}
    for tensor in sorted(weights)[2:]:
        change(path, data_start(path) + header[tensor]["data_offsets"][0] + 4000)
        names.add(name_of(config))
    assert len(names) == 3


@pytest.mark.parametrize("damage", [
    b"", b"short", (1 << 62).to_bytes(8, "little"), *(
        len(header).to_bytes(8, "little") + header
        for header in (
            b"[]", b"{}", b"null", b"{", b'{"a": {"b": [1]}}', b'{"a": {"data_offsets": []}}', b"[" * 9999,
            *(b'{"a": {"data_offsets": [%s]}}' % start for start in (b'"0"', b"-9", b"9", b"1e999", b"1048576000")),
        )
    )
])  # fmt: skip
def test_a_damaged_header_is_sampled_as_any_file(config, folder, damage):
    path = folder / "model-1.safetensors"
    path.write_bytes(damage + bytes(1 << 20))
    names = {name_of(config)}
    change(path, (path.stat().st_size - 4096) // 63)
    names.add(name_of(config))
    change(path, path.stat().st_size - 1)
    names.add(name_of(config))
    assert len(names) == 3


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".gguf"])
def test_other_files_are_sampled_from_end_to_end(tmp_path, config, ending):
    path = tmp_path / f"pytorch_model{ending}"
    names = set()
    for size in (1, 5000, 64 * 4096, 64 * 4096 + 9):
        path.write_bytes(bytes(size))
        for offset in {0, size // 2 if size <= 64 * 4096 else 0, size - 1}:
            change(path, offset)
            names.add((size, name_of(at(config, tmp_path))))
    assert len(names) == 1 + 3 + 3 + 2


def test_one_file_of_a_folder_is_not_another(tmp_path, config):
    for quantized in ("q4.gguf", "q8.gguf"):
        (tmp_path / quantized).write_bytes(bytes(100))
    assert len({name_of(at(config, tmp_path / quantized)) for quantized in ("q4.gguf", "q8.gguf")}) == 2


def test_a_name_stands_in_place_of_the_files(config, folder):
    name = name_of(config, name="step-1")
    assert name not in (name_of(config), name_of(config, name="step-2"))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert name_of(config, name="step-1") == name
    config.cache_config.block_size = 32
    assert name_of(config, name="step-1") != name


def test_dummy_weights_are_told_by_the_configuration(config, folder):
    config.load_config.load_format = "dummy"
    name = name_of(config)
    change(folder / "model-1.safetensors", data_start(folder / "model-1.safetensors"))
    assert name_of(config) == name
    config.load_config.load_format = "auto"
    assert name_of(config) != name


@pytest.mark.parametrize("load_format", ["tensorizer", "of_a_plugin"])
def test_weights_that_come_from_elsewhere_want_a_name(config, load_format):
    config.load_config.load_format = load_format
    with pytest.raises(ConfigError, match='set "namespace"'):
        name_of(config)
    name_of(config, name="mine")


def test_a_folder_without_weights_wants_a_name(config, folder):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match='set "namespace"'):
        name_of(config)


@pytest.mark.parametrize("where", ["nobody/nothing", "/no/such/folder", "s3://bucket/model"])
def test_a_model_that_is_not_here_wants_a_name(config, where):
    with pytest.raises(ConfigError, match='set "namespace"'):
        name_of(at(config, where))


def test_weights_taken_from_a_store_want_a_name(config):
    config.model_config.model_weights = "s3://bucket/model"  # and the folder has the rest
    with pytest.raises(ConfigError, match='set "namespace"'):
        name_of(config)


def test_a_model_of_the_hub_is_found_in_its_cache(tmp_path, config, folder):
    hub = tmp_path / "hub" / "models--me--mine"
    snapshot = hub / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    name = name_of(config)
    config.load_config.download_dir = str(tmp_path / "hub")
    assert name_of(at(config, "me/mine")) == name
