"""The promises of order on a real GPU: behind long kernels, while a graph is captured, while the pool is registered.

`make test-gpu` runs them; torch brings the kernels.
"""

import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
from kvcache import SHAPES, DeviceCache, keys_of, make_engine
from stress import CHAIN_BLOCKS, run_stress

import kvortex

pytestmark = pytest.mark.gpu

KERNEL_CYCLES = 2_000_000  # about a millisecond


@pytest.fixture
def torch():
    import torch

    torch.cuda.init()
    return torch


def put_kernel_in_front(torch):
    """A function that puts a long kernel on a stream of ours."""

    def on_stream(stream):
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle)):
            torch.cuda._sleep(KERNEL_CYCLES // 20)

    return on_stream


@pytest.mark.parametrize("shape", SHAPES)
def test_save_waits_for_a_long_kernel_and_the_next_writer_waits_for_the_save(make_bench, torch, shape):
    bench = make_bench(16, shape)
    compute = torch.cuda.Stream()
    with torch.cuda.stream(compute):
        torch.cuda._sleep(KERNEL_CYCLES * 20)
    ours = kvortex.Stream.borrow(bench.cache.device, compute)
    for block in range(4):
        bench.cache.scribble(block, 0x10 + block, ours)
    job = bench.engine.save_blocks(keys_of(range(4)), np.arange(4), stream=compute)
    assert not job.done(), "the kernel is still running"
    job.wait_on(compute)
    for block in range(4):
        bench.cache.scribble(block, 0x99, ours)
    compute.synchronize()
    job.wait(20_000)  # the copies are over, but who retires the job may not have seen it yet
    bench.load(range(4), range(8, 12)).wait(20_000)
    for block in range(4):
        saved = bytes([0x10 + block]) * bench.cache.block_bytes
        assert bench.cache.read(8 + block) == bench.cache.back(saved)


@pytest.mark.parametrize("shape", SHAPES)
def test_load_waits_for_a_long_kernel_and_the_next_reader_waits_for_the_load(make_bench, torch, shape):
    bench = make_bench(16, shape)
    bench.saved(range(4))
    compute = torch.cuda.Stream()
    ours = kvortex.Stream.borrow(bench.cache.device, compute)
    with torch.cuda.stream(compute):
        torch.cuda._sleep(KERNEL_CYCLES * 20)
    for block in range(8, 12):
        bench.cache.scribble(block, 0x77, ours)
    job = bench.engine.load_blocks(keys_of(range(4)), np.arange(8, 12), stream=compute)
    job.wait_on(compute)
    assert [bench.cache.read(8 + block, ours) for block in range(4)] == [
        bench.cache.loaded(block) for block in range(4)
    ]


def test_the_legacy_default_stream_orders_a_save(make_bench, torch):
    bench = make_bench(4)
    torch.cuda._sleep(KERNEL_CYCLES * 20)  # torch's current stream is the legacy default one
    ours = kvortex.Stream.borrow(bench.cache.device, torch.cuda.current_stream())
    bench.cache.scribble(0, 0x42, ours)
    job = bench.engine.save_blocks(keys_of([1]), [0], stream=0)
    job.wait_on(0)
    bench.cache.scribble(0, 0x43, ours)
    job.wait(20_000)
    bench.load([1], [9]).wait(20_000)
    assert set(bench.cache.read(9)) == {0x42}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", ["one_allocation", "separate_allocations", "gathered"])
def test_eight_threads_behind_long_kernels_get_no_wrong_block(device, torch, seed, shape):
    with ExitStack() as stack:
        cache = DeviceCache(device, shape, num_blocks=8 * CHAIN_BLOCKS, num_layers=4, piece_bytes=4096)
        stack.callback(cache.close)
        engine = make_engine(cache, 60)
        stack.callback(engine.shutdown)
        report = run_stress([(engine, cache)], operations=8000, seed=seed, on_stream=put_kernel_in_front(torch))
        print(report)
        assert report.wrong_blocks == 0
        assert report.loaded_blocks > 1000


@pytest.mark.timeout(600)
def test_capture_on_another_stream_and_registering_disturb_nobody(device, torch, seed):
    """Graphs are captured in global mode all the while, as blocks move and the pool is registered chunk by chunk."""
    with ExitStack() as stack:
        cache = DeviceCache(device, "separate_allocations", num_blocks=8 * CHAIN_BLOCKS, num_layers=4, piece_bytes=4096)
        stack.callback(cache.close)
        config = kvortex.KVortexConfig(
            cpu_pool_size_bytes=8 << 30, device=device.name, pool_first_chunk_bytes=4 << 20, pool_chunk_bytes=64 << 20
        )
        captured, stop = [], threading.Event()
        weights = torch.randn(256, 256, device="cuda")
        result = weights + 50

        def capture():
            try:
                while not stop.is_set():
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, capture_error_mode="global"):
                        output = weights.clone()
                        for _ in range(50):
                            output += 1
                    graph.replay()
                    captured.append(torch.allclose(output, result, atol=1e-3))
            except Exception as error:
                captured.append(error)

        def stop_capturing():
            stop.set()
            thread.join()

        thread = threading.Thread(target=capture)
        thread.start()
        stack.callback(stop_capturing)
        deadline = time.monotonic() + 60
        while not captured:
            assert time.monotonic() < deadline, "no graph was captured at all"
            time.sleep(0.001)
        before = len(captured)
        engine = kvortex.KVortexEngine.create(config, layout=cache.layout)
        stack.callback(engine.shutdown)
        engine.wait_ready(60_000)
        beside_registering = len(captured) - before
        report = run_stress([(engine, cache)], operations=8000, seed=seed, num_chains=4000)
        stop_capturing()
        print(report, beside_registering, "graphs captured beside registering,", len(captured), "in all")
        assert report.wrong_blocks == 0
        assert all(outcome is True for outcome in captured), f"a capture broke: {set(captured) - {True}}"
        assert beside_registering > 0, "no graph was captured while the pool was registered"
        assert len(captured) > before + beside_registering, "no graph was captured while blocks moved"


def test_a_capturing_stream_is_refused_and_its_graph_stays_whole(make_bench, torch):
    bench = make_bench(4)
    bench.saved([1])
    job = bench.load([1], [9])
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    data = torch.zeros(16, device="cuda")
    with torch.cuda.graph(graph, stream=side):
        data += 1
        for call in (
            lambda: bench.engine.save_blocks(keys_of([2]), [0], stream=side),
            lambda: bench.engine.load_blocks(keys_of([1]), [8], stream=side),
            lambda: job.wait_on(side),
        ):
            with pytest.raises(ValueError, match="captur"):
                call()
    graph.replay()
    torch.cuda.synchronize()
    assert data.tolist() == [1.0] * 16
    job.wait(20_000)


def test_strided_copies_are_probed_as_the_driver_allows_them(device):
    legal = {}
    for shape in SHAPES:
        cache = DeviceCache(device, shape, num_blocks=64, num_layers=8, piece_bytes=4096)
        with make_engine(cache, 4) as engine:
            legal[shape] = engine.get_stats().strided
            for row in engine.get_stats().planner:
                print(shape, row)
        cache.close()
    print(legal)
    assert legal["one_allocation"]
    assert not legal["separate_allocations"] and not legal["cross_layer"]


def test_pieces_at_even_distances_in_separate_allocations_are_not_copied_strided(device, stream):
    """Allocations that lie side by side look like one; the driver knows better, and so must the probe."""
    size, count = 2 << 20, 8
    buffers = [kvortex.DeviceBuffer(size, device) for _ in range(64)]
    bases = sorted(buffer.address for buffer in buffers)
    spans = [last - first for first, last in zip(bases, bases[count - 1 :], strict=False)]
    starts = [index for index, span in enumerate(spans) if span == size * (count - 1)]
    assert starts, "no run of allocations side by side; allocate more"
    run = bases[starts[0] : starts[0] + count]
    layout = kvortex.KVLayout([(base, 4096, 4096) for base in run], size // 4096)
    assert layout.num_groups == 1
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, device=device.name)
    with kvortex.KVortexEngine.create(config, layout=layout) as engine:
        print("strided across allocations:", engine.get_stats().strided)
        by_address = {buffer.address: buffer for buffer in buffers}
        data = np.random.default_rng(1).integers(0, 256, (count, 4096), dtype=np.uint8)
        for base, piece in zip(run, data, strict=True):
            by_address[base].copy_from(piece, 5 * 4096)
        engine.save_blocks(keys_of([1]), [5], stream=stream).wait(20_000)
        engine.load_blocks(keys_of([1]), [7], stream=stream).wait(20_000)
        back = np.empty_like(data)
        for base, piece in zip(run, back, strict=True):
            by_address[base].copy_to(piece, 7 * 4096)
        assert (back == data).all()
        assert not engine.get_stats().strided


def test_torch_tensors_of_every_layout_come_back(device, torch, stream):
    for shape, block_dim in (((2, 32, 16, 2, 8), 1), ((32, 2, 16, 2, 8), 0), ((32, 2, 16, 8), 0), ((32, 16, 72), 0)):
        tensors = [torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda") for _ in range(3)]
        torch.cuda.synchronize()
        layout = kvortex.KVLayout.from_tensors(tensors, block_dim)
        config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, device=device.name)
        with kvortex.KVortexEngine.create(config, layout=layout) as engine:
            engine.wait_ready(20_000)
            engine.save_blocks(keys_of(range(5)), np.arange(5), stream=torch.cuda.current_stream()).wait(20_000)
            job = engine.load_blocks(keys_of(range(5)), np.arange(20, 25), stream=torch.cuda.current_stream())
            job.wait_on(torch.cuda.current_stream())
            for tensor in tensors:
                blocks = tensor.movedim(block_dim, 0)
                assert torch.equal(blocks[:5], blocks[20:25])
