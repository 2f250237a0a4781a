"""What users write. Type checkers let all of it pass but the lines that say "wrong"; it is checked and never run."""

import asyncio
from pathlib import Path

import numpy as np

import kvortex
from kvortex import info, metrics
from kvortex.config import Setting


def configure() -> kvortex.KVortexConfig:
    settings: dict[str, Setting] = kvortex.KVortexConfig.find_settings(Path("kvortex.toml"), max_jobs=16)
    print(info.table(info.collect(settings, disk_paths=[Path("/mnt")])))
    loaded = kvortex.KVortexConfig.load("kvortex.toml", environ={}, block_bytes="64KiB", deferred="auto")
    half: int = loaded.cpu_pool_size_bytes // 2
    tier = kvortex.DiskTier([Path("/mnt/a"), "/mnt/b"], "500GiB", write_bytes_per_s="1GB")
    spread: tuple[str, ...] = tier.paths
    print(spread, tier.disk_bytes >> 30, loaded.sources["max_jobs"], kvortex.get_include().upper())
    kvortex.KVortexConfig()  # wrong
    kvortex.KVortexConfig(half)  # wrong
    kvortex.KVortexConfig(cpu_pool_size_bytes="1GiB", max_job=16)  # wrong
    kvortex.KVortexConfig(cpu_pool_size_bytes="1GiB", deferred="sometimes")  # wrong
    kvortex.KVortexConfig(cpu_pool_size_bytes=1.5)  # wrong
    kvortex.KVortexConfig.load(max_jobs="many")  # wrong
    kvortex.KVortexConfig.load(cpu_pool_bytes="1GiB")  # wrong
    loaded.max_jobs = 3  # wrong
    print(loaded.pool_bytes)  # wrong
    kvortex.DiskTier("/mnt")  # wrong
    kvortex.DiskTier(3, disk_bytes=1 << 30)  # wrong
    info.collect(settings, probes=True)  # wrong
    return kvortex.KVortexConfig(cpu_pool_size_bytes="16GiB", block_bytes=1 << 16, tiers=(tier,), namespace="m")


def move(engine: kvortex.KVortexEngine, layout: kvortex.KVLayout) -> int:
    keys = kvortex.block_keys(np.arange(320), block_size=16, salt=b"tenant")
    hits = engine.check_blocks(keys)
    job: kvortex.Job = engine.load_blocks(keys[: hits.leading], range(hits.leading), stream=0, promote_timeout_ms=100)
    job.wait_on(0)
    engine.save_blocks(keys[hits.leading :], [3, 4], after=keys[: hits.leading], layout=layout).wait(timeout_ms=1000)
    engine.save_blocks(keys, data_ptrs=[np.zeros(8), 4096], sizes=[64, 64], deferred="auto").done()
    with engine.prefetch(keys, timeout_ms=5) as prefetch:
        asyncio.run(wait_for(engine, job, prefetch))
        engine.load_blocks(keys, [1], prefetched=prefetch)
    engine.clear(weights="step-1200")
    engine.save_blocks(keys, wrong=1)  # wrong
    engine.save_blocks([bytes(32)], [1])  # wrong
    engine.save_blocks(keys, [0], layout=np.zeros(3))  # wrong
    engine.save_blocks(keys, [0], deferred="later")  # wrong
    engine.load_blocks()  # wrong
    engine.load_blocks(keys, [0], prefetched=job)  # wrong
    engine.load_block(keys, [0])  # wrong
    print(engine.check_blocks(keys).length)  # wrong
    engine.check_blocks(keys, [0])  # wrong
    engine.prefetch(keys, "soon")  # wrong
    engine.flush(timeout=3)  # wrong
    engine.add_layout(np.zeros(3))  # wrong
    engine.remove_layout()  # wrong
    engine.wait_ready("long")  # wrong
    engine.create(layout)  # wrong
    print(engine.config.num_streams)  # wrong
    engine.clear(3)  # wrong
    job.wait("1s")  # wrong
    job.result()  # wrong
    prefetch.num_blocks()  # wrong
    kvortex.block_keys(np.arange(320), 16, salt="tenant")  # wrong
    kvortex.block_keys(np.arange(320), 16.0)  # wrong
    kvortex.block_key(np.arange(320), 16)  # wrong
    return job.num_blocks + engine.discard_blocks(keys) + engine.touch_blocks(keys) + engine.flush(1000)


async def wait_for(engine: kvortex.KVortexEngine, job: kvortex.Job, prefetch: kvortex.Prefetch) -> int:
    blocks: int = (await job).num_blocks + (await prefetch).num_blocks
    engine.shutdown(3)  # wrong
    return blocks


class OwnEngine(kvortex.KVortexEngine):
    """Is what `create` returns."""

    prompts = 0


def watch() -> None:
    config = configure()
    with OwnEngine.create(config) as engine, metrics.start_exporter(engine, 0, labels={"rank": "0"}) as exporter:
        stats = engine.get_stats()
        rate: float = stats.cache_hit_rate
        engine.prompts += 1
        causes: dict[str, int] = stats.tiers[0].misses
        page: str = kvortex.prometheus_text(stats, {"rank": "0"})
        names = [family.name.upper() for family in metrics.families(stats)]
        print(rate, causes, page, names, exporter.port + 1, stats.planner[0].backend)
        print(stats.hit_rate)  # wrong
        stats.blocks_hit = 1  # wrong
        print(stats.tiers.misses)  # wrong
        kvortex.prometheus_text(engine)  # wrong
        metrics.start_exporter(engine, "9400")  # wrong
        metrics.start_exporter(stats)  # wrong
        print(exporter.address)  # wrong
        kvortex.KVLayout.contiguous(0, num_layers=2)  # wrong
    try:
        layout = kvortex.KVLayout.from_tensors([np.zeros((4, 8))], num_blocks=4)
        kvortex.KVortexEngine(config)  # wrong
        move(engine, layout)
    except kvortex.DriverError as error:
        print(error.code + 1, error.name.upper())
