"""What engine_run.py can do with an engine so that tests may judge what came of it."""

import random
import threading
import time


class Workload:
    """Prompts by number, the same in every run: some share a prefix, some none, some go on where another's ended."""

    def __init__(self, args, vocabulary, scale):
        self.args, self.vocabulary, self.scale = args, vocabulary, scale
        rng = random.Random(f"{args.seed}/prefixes")
        lengths = [rng.choice([0, rng.randint(0, int(2000 * scale))]) for _ in range(args.prefixes)]
        self.prefixes = [self.tokens(rng, length) for length in lengths]
        self.longest = int(2500 * scale)

    def tokens(self, rng, count):
        return [rng.randrange(3, self.vocabulary) for _ in range(count)]

    def prompt(self, number):
        if self.args.distinct:
            number = random.Random(f"{self.args.seed}/{number}/which").randrange(self.args.distinct)
        return self.different(number)

    def different(self, number):
        rng = random.Random(f"{self.args.seed}/{number}")
        earlier = number - rng.randint(1, 3 * self.args.concurrency)
        head = self.different(earlier) if earlier >= 0 and rng.random() < 0.3 else rng.choice(self.prefixes)
        length = rng.randint(int(200 * self.scale), self.longest)
        head = head[: length - 1]
        return head + self.tokens(rng, min(length - len(head), max(1, int(600 * self.scale))))

    def max_tokens(self, number):
        rng = random.Random(f"{self.args.seed}/{number}/out")
        if rng.random() < self.args.short:  # their blocks are free again while they are being saved
            return rng.randint(1, 3)
        return rng.randint(16, 128) // (1 if self.scale == 1 else 4)


class BusyLink:
    """Copies to the host on a few streams without an end: the saves of the engine share the link with them, and are
    late, which is what a wait left out needs to be seen.
    """

    NUM_STREAMS, COPY_BYTES = 4, 256 << 20

    def __init__(self):
        self.stopping = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        import torch

        source = torch.zeros(self.COPY_BYTES, dtype=torch.uint8, device="cuda")
        lanes = [
            (torch.cuda.Stream(), torch.cuda.Event(), torch.empty(self.COPY_BYTES, dtype=torch.uint8, pin_memory=True))
            for _ in range(self.NUM_STREAMS)
        ]
        while not self.stopping:
            for stream, event, target in lanes:
                event.synchronize()  # of the last round; returns at once in the first
                with torch.cuda.stream(stream):
                    for _ in range(2):
                        target.copy_(source, non_blocking=True)
                    event.record()
        torch.cuda.synchronize()

    def stop(self):
        self.stopping = True
        self.thread.join()


def stress(engine, args):
    """Many requests at once on few device blocks, aborts among them. With ``--requests`` every run of one seed must
    yield the same tokens for the same request, which ``--tokens`` prints.
    """
    workload = Workload(args, engine.vocabulary, args.scale or (1 if engine.on_gpu else 0.1))
    rng = random.Random(f"{args.seed}/aborts")
    others = BusyLink() if args.busy_link else None
    active, outputs, cached, aborted, added = {}, {}, 0, 0, 0
    began = time.monotonic()
    llm_engine = engine.llm.llm_engine
    while True:
        more = added < args.requests if args.requests else time.monotonic() - began < args.seconds
        while more and len(active) < args.concurrency:
            engine.add(f"stress-{added}", workload.prompt(added), workload.max_tokens(added))
            active[f"stress-{added}"] = added
            added += 1
            more = not args.requests or added < args.requests
        if not active:
            break
        for output in llm_engine.step():
            if output.finished and output.request_id in active:
                outputs[active.pop(output.request_id)] = output.outputs[0]
                cached += output.num_cached_tokens or 0
        if active and rng.random() < args.abort_rate:
            # Half of them among the last to come, which wait, load or have just begun.
            name = rng.choice(list(active)[-4:] if rng.random() < 0.5 else list(active))
            llm_engine.abort_request([name])
            del active[name]
            aborted += 1
    if others is not None:
        others.stop()
    engine.drain()
    seconds = time.monotonic() - began
    result = {
        "requests": len(outputs),
        "aborted": aborted,
        "tokens": sum(len(output.token_ids) for output in outputs.values()),
        "tokens_cached": cached,
        "seconds": round(seconds, 2),
    }
    if args.tokens:
        result["output"] = {number: list(output.token_ids) for number, output in outputs.items()}
    return result


def restore(engine, args):
    """A few prompts cold, back from the host, with what they generated, after a reset of the host's cache, and with
    wrong content in the host's memory.
    """
    rng = random.Random(f"{args.seed}/restore")
    prompts = [[rng.randrange(3, engine.vocabulary) for _ in range(count)] for count in (150, 128, 200)]
    result = {"lengths": [len(prompt) for prompt in prompts], "cold": engine.generate(prompts, 40)}
    follow_ups = [prompt + out for prompt, out in zip(prompts, result["cold"]["tokens"], strict=True)]
    engine.forget()
    result["back"] = engine.generate(prompts, 40)
    engine.forget()
    result["follow_up_back"] = engine.generate(follow_ups, 40)
    engine.forget(host=True)
    result["follow_up_cold"] = engine.generate(follow_ups, 40)
    engine.forget(host=True)
    result["cold_again"] = engine.generate(prompts, 40)
    if engine.worker_half is not None:
        # One block of one prompt, then every block of every prompt; then the engine is itself again.
        engine.forget(host=True)
        engine.saved_slots.clear()
        engine.generate(prompts[:1], 1)
        engine.forget()
        engine.scribble(engine.saved_slots[2:3])
        result["one_block_wrong"] = engine.generate(prompts[:1], 40)
        engine.forget(host=True)
        engine.generate(prompts, 1)
        engine.forget()
        engine.scribble(range(engine.worker_half.pool.num_slots))
        result["all_blocks_wrong"] = engine.generate(prompts, 40)
    engine.forget(host=True)
    result["cold_at_last"] = engine.generate(prompts, 40)
    engine.forget(host=True)
    return result


def overflow(engine, args):
    """Every prompt twice, the second time from the last to the first, while the host's pool holds less than all."""
    rng = random.Random(f"{args.seed}/overflow")
    prompts = [[rng.randrange(3, engine.vocabulary) for _ in range(rng.randint(60, 300))] for _ in range(12)]
    result = {}
    for name in ("first", "backwards"):  # where something is left to find
        result[name] = {"tokens": [], "cached": []}
        for prompt in prompts:
            for what, value in engine.generate([prompt], 8).items():
                result[name][what] += value
        engine.forget()
        prompts.reverse()
    return result


def again(engine, args):
    """The same prompts again and again, more than the device holds and few tokens each: its blocks change hands while
    they are being saved.
    """
    rng = random.Random(f"{args.seed}/again")
    prompts = [[rng.randrange(3, engine.vocabulary) for _ in range(rng.randint(60, 300))] for _ in range(12)]
    return {"rounds": [engine.generate(prompts, 4)["tokens"] for _ in range(4)]}


def leave(engine, args):
    """Go with a load and a save under way: the process must end well by itself."""
    rng = random.Random(f"{args.seed}/leave")
    prompts = [[rng.randrange(3, engine.vocabulary) for _ in range(120)] for _ in range(2)]
    engine.generate(prompts[:1], 1)
    engine.forget()
    engine.add("loads", prompts[0], 8)
    engine.add("saves", prompts[1], 8)
    engine.llm.llm_engine.step()
    running = engine.worker_half.running.values()
    return {"in_flight": sorted(each.transfer.kind for each in running)}


def serve(engine, args):
    """A dozen prompts one after the other, as another engine over the same disk has served them, or will."""
    rng = random.Random(f"{args.seed}/serve")
    prompts = [[rng.randrange(3, engine.vocabulary) for _ in range(rng.randint(60, 300))] for _ in range(12)]
    outputs = [engine.generate([prompt], 8) for prompt in prompts]
    result = {what: [output[what][0] for output in outputs] for what in outputs[0]}
    return {"lengths": [len(prompt) for prompt in prompts], **result}
