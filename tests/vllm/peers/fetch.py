"""Fetches the tests that vLLM ships with its source, into FOLDER: python fetch.py FOLDER

Of the archive on the package index, which pip downloads and verifies, the files named below are unpacked and nothing is
built. The models that they name get a configuration in an invented cache, so that nobody asks a model hub.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = [
    "__init__.py",
    "v1/__init__.py",
    "v1/core/__init__.py",
    "v1/core/utils.py",
    "v1/core/test_scheduler.py",
    "v1/core/test_async_scheduler.py",
    "v1/core/test_deferred_block_free.py",
    "v1/kv_connector/__init__.py",
    "v1/kv_connector/unit/__init__.py",
    "v1/kv_connector/unit/conftest.py",
    "v1/kv_connector/unit/utils.py",
    "v1/kv_connector/unit/test_cache_pollution_prevention.py",
    "v1/kv_connector/unit/test_config.py",
    "v1/kv_connector/unit/test_error_propagation.py",
    "v1/kv_connector/unit/test_hma_auto_config.py",
    "v1/kv_connector/unit/test_invalid_blocks_correctness.py",
    "v1/kv_connector/unit/test_kv_connector_lifecycle.py",
    "v1/kv_connector/unit/test_kv_load_failure_recovery.py",
    "v1/kv_connector/unit/test_multi_connector.py",
    "v1/kv_connector/unit/test_output_aggregator.py",
    "v1/kv_connector/unit/test_scheduler_kv_connector_override.py",
]
OPT = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "ffn_dim": 3072, "max_position_embeddings": 2048, "vocab_size": 50272,
    "word_embed_proj_dim": 768, "torch_dtype": "float16", "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS = {
    "facebook/opt-125m": OPT,
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA,
}


def main(folder):
    wanted = json.dumps([Path(__file__).read_text(), (HERE / "requirements.txt").read_text()])
    stamp = folder / "made_from"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    unpack(download(folder), folder)
    invent_models(folder / "hub")
    (folder / "pytest.ini").write_text("[pytest]\n")  # not the project's own settings
    stamp.write_text(wanted)


def download(folder):
    """The archive. pip wants its metadata, for which it would build: what builds is stood in for by `stand_in`."""
    environment = {**os.environ, "PYTHONPATH": str(HERE / "stand_in")}
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", "-d", folder, "-r", HERE / "requirements.txt"]
    subprocess.run(command, env=environment, check=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def unpack(archive, folder):
    with tarfile.open(archive) as tar:
        root = archive.name.removesuffix(".tar.gz")
        for name in TESTS:
            tar.extract(f"{root}/tests/{name}", folder, filter="data")
    (folder / root / "tests").rename(folder / "tests")
    (folder / root).rmdir()
    archive.unlink()


def invent_models(hub):
    for name, config in MODELS.items():
        model = hub / f"models--{name.replace('/', '--')}"
        (model / "snapshots" / "0").mkdir(parents=True)
        (model / "snapshots" / "0" / "config.json").write_text(json.dumps(config))
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("0")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
