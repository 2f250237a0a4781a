"""What engine_run.py can measure. Every mode gets the same prompts in the same order, so that its numbers pair."""

import random
import statistics
import time

DECODE_BATCH = 16  # requests that decode
DECODE_PROMPT = 512


def throughput(engine, args):
    """All requests at once, then all of them again with nothing left on the device but, if the mode has one, a host
    cache that knows them; for each share of a prompt that the requests have in common. Each repetition has prompts of
    its own.
    """
    rng = random.Random(f"{args.seed}/throughput")
    (prompt_tokens,) = args.prompt_tokens
    engine.wait_ready()
    rounds = []
    for percent in args.shared:
        shared = prompt_tokens * percent // 100

        def prompts(count, shared=shared):
            head = tokens(engine, rng, shared)
            return [head + tokens(engine, rng, prompt_tokens - shared) for _ in range(count)]

        for _ in range(args.warmup):
            some = prompts(max(1, args.requests // 8))
            for _ in range(2):
                engine.generate(some, args.output_tokens)
                engine.forget()
        for repetition in range(args.repeat):
            batch = prompts(args.requests)
            for again in (False, True):
                began = time.perf_counter()
                outcome = engine.generate(batch, args.output_tokens)
                seconds = time.perf_counter() - began
                rounds.append({
                    "shared_percent": percent,
                    "repetition": repetition,
                    "again": again,
                    "seconds": round(seconds, 4),
                    "tokens_per_second": round(args.requests * (prompt_tokens + args.output_tokens) / seconds, 1),
                    "tokens_cached": sum(outcome["cached"]),
                })  # fmt: skip
                engine.forget()
    return {
        "requests": args.requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": args.output_tokens,
        "rounds": rounds,
    }


def first_token(engine, args):
    """Milliseconds to the first token of one prompt: computed, with its prefix on the device, and back from the host
    (or computed again, in a mode without one), for each of the lengths; with a disk also back from that. Each
    repetition has a prompt of its own; the first ones warm up.
    """
    rng = random.Random(f"{args.seed}/first_token")
    engine.wait_ready()
    results = {}
    for prompt_tokens in args.prompt_tokens:
        times, cached, same = {"cold": [], "device": [], "back": []}, {}, True
        if engine.tier is not None:
            times["disk"] = []
        for repetition in range(args.warmup + args.repeat):
            prompt, generated = tokens(engine, rng, prompt_tokens), []
            for phase in times:
                began = time.perf_counter()
                outcome = engine.generate([prompt], 1)
                seconds = time.perf_counter() - began
                generated += outcome["tokens"]
                cached[phase] = outcome["cached"][0]
                if repetition >= args.warmup:
                    times[phase].append(1000 * seconds)
                engine.settle()
                if phase != "cold":
                    engine.forget()
                if phase == "back" and engine.tier is not None:
                    engine.scheduler_half.index.evict(engine.scheduler_half.index.num_ready)
            same &= all(each == generated[0] for each in generated)
        results[prompt_tokens] = {
            **{f"{phase}_ms": round(statistics.median(found), 1) for phase, found in times.items()},
            "milliseconds": {phase: [round(each, 1) for each in found] for phase, found in times.items()},
            "tokens_cached": cached,
            "same_tokens": same,
        }
    return {"prompts": results}


def decode(engine, args):
    """Tokens a second of requests that decode, alone and while others come between: every `--every` steps one more, in
    turn one that the host knows and one that is new. The work for a token decoded is so the same in every mode; the
    median step tells what a mode costs where nothing is computed or loaded beside.
    """
    rng = random.Random(f"{args.seed}/decode")
    (prompt_tokens,) = args.prompt_tokens
    engine.wait_ready()
    known = [tokens(engine, rng, prompt_tokens) for _ in range(args.others // 2)]
    for prompt in known:
        engine.generate([prompt], 1)
    engine.forget()
    results = {}
    for name, others in (("alone", []), ("beside_others", known)):
        arrivals = [each for prompt in others for each in (prompt, tokens(engine, rng, prompt_tokens))]
        num_steps = args.every * (args.others + 1)
        running = {f"{name}-{index}": 0 for index in range(DECODE_BATCH)}
        for request in running:
            engine.add(request, tokens(engine, rng, DECODE_PROMPT), num_steps + 8)
        while not all(running.values()):
            step(engine, running)
        began, decoded, cached, steps = time.perf_counter(), sum(running.values()), 0, []
        for count in range(num_steps):
            if count % args.every == args.every - 1 and arrivals:
                engine.add(f"{name}-other-{count}", arrivals.pop(0), 1)
            step_began = time.perf_counter()
            cached += step(engine, running)
            steps.append(1000 * (time.perf_counter() - step_began))
        seconds = time.perf_counter() - began
        results[name] = {
            "tokens_per_second": round((sum(running.values()) - decoded) / seconds, 1),
            "step_ms": {"median": round(statistics.median(steps), 2), "longest": round(max(steps), 1)},
            "tokens_cached": cached,
        }
        while engine.llm.llm_engine.has_unfinished_requests():
            step(engine, running)
        engine.forget()
    return {"others": args.others, "prompt_tokens": prompt_tokens, **results}


def step(engine, running):
    """One step of the engine: note how far the requests in `running` are, and return the others' cached tokens."""
    cached = 0
    for output in engine.llm.llm_engine.step():
        if output.request_id in running:
            running[output.request_id] = len(output.outputs[0].token_ids)
        elif output.finished:
            cached += output.num_cached_tokens or 0
    return cached


def tokens(engine, rng, count):
    return rng.choices(range(3, engine.vocabulary), k=count)
