"""The command ``headstart``: reads the settings, sets up logging and hands over to a role or a tool."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from cachebus.errors import HeadstartError
from cachebus.settings import ModelSettings
from deploy.bench import options as bench_options
from deploy.cache import options as cache_options
from deploy.plan import options as plan_options
from deploy.settings import Settings, as_help, read_settings

EXIT_ERROR = 2
_EPILOG = """exit codes: 0 done; 1 failed, or an unexpected error; 2 wrong usage or settings, or something that is needed is missing;
3 a worker's engine died; 4 a worker's engine did not start"""
_ROLES = {
    "cachebus": "run the node's cache bus",
    "prefill": "run a prefill worker",
    "decode": "run a decode worker",
    "router": "run the router with the OpenAI endpoint",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    try:
        given = [*options.set, f"router.processes={options.workers}"] if options.command == "router" and options.workers is not None else options.set
        settings = read_settings(options.config, given, os.environ)
        if getattr(options, "model", None):
            settings = msgspec.structs.replace(settings, model=msgspec.structs.replace(settings.model, name=options.model))
        return _run(options, settings)
    except HeadstartError as error:
        print(f"headstart: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace, settings: Settings) -> int:
    """The composition root: each command imports only what it needs."""
    if options.command == "config":
        print(as_help(settings), end="")
        return 0
    if options.command == "cachebus":
        from cachebus import role

        return role.run(settings.cache, settings.security)
    if options.command == "router":
        from router.serve import serve

        return serve(settings.router, settings.cache.resolved_run_dir(os.environ), settings.security.tenants_file, settings.scaling)
    if options.command == "status":
        from deploy import status

        return status.run(settings, json_output=options.json)
    if options.command == "doctor":
        from deploy.doctor import run as doctor

        return doctor.run(settings, json_output=options.json)
    if options.command in ("keys", "cache", "sim", "plan"):
        return _tool(options, settings)
    if options.command == "bench":
        return _bench(options, settings)
    settings = msgspec.structs.replace(settings, model=resolved(settings.model))
    if options.command == "prefill":
        import prefill.role

        return prefill.role.run(settings.model, settings.prefill, settings.cache, settings.security, options.name or _worker_name("prefill"))
    if options.command == "decode":
        import decode.role

        return decode.role.run(settings.model, settings.decode, settings.cache, settings.security, options.name or _worker_name("decode"))
    if options.command == "up":
        from deploy import launcher

        return launcher.up(settings)
    from deploy.demo import run

    return run.run(settings, json_output=options.json)


def _tool(options: argparse.Namespace, settings: Settings) -> int:
    if options.command == "keys":
        from deploy import keys

        return keys.run(settings, options)
    if options.command == "cache":
        from deploy.cache import run as cache

        return cache.run(settings, options)
    if options.command == "sim":
        from deploy.sim import run as sim

        return sim.run(settings, options)
    from deploy.plan import run as plan

    return plan.run(options)


def _bench(options: argparse.Namespace, settings: Settings) -> int:
    if options.bench == "plot":
        if importlib.util.find_spec("matplotlib") is None:
            raise HeadstartError("plots need matplotlib: install headstart[bench], or matplotlib itself")
        from deploy.bench import plot

        return plot.run(options)
    if options.bench == "routing":
        from deploy.bench import routing

        return routing.run(options)
    if options.bench == "router":
        from deploy.bench import router

        return router.run(options)
    if options.bench == "scaling":
        from deploy.bench import scaling

        return scaling.run(options)
    if options.bench == "index":
        from deploy.bench import index

        return index.run(options)
    if options.bench == "soak":
        from deploy.bench import soak

        return soak.run(options)
    if options.bench == "tiers":
        from deploy.bench import tiers

        return tiers.run(options)
    settings = msgspec.structs.replace(settings, model=resolved(settings.model))
    if options.bench == "hits":
        from deploy.bench import hits

        return hits.run(settings, options)
    if options.bench == "prefix":
        from deploy.bench import prefix

        return prefix.run(settings, options)
    from deploy.bench import chat, decode, handover, reuse, trace_hits

    run = {"chat": chat.run, "decode": decode.run, "handover": handover.run, "reuse": reuse.run, "trace": trace_hits.run}[options.bench]
    return run(settings, options)


def resolved(model: ModelSettings) -> ModelSettings:
    """The model to serve: where none is named, the one that is made on the spot."""
    if model.name:
        return model
    from deploy.model import NAME, ensure_demo_model

    name = model.served_name or NAME
    # vLLM takes "auto" on float32 weights for half precision, whose ties would blur every comparison of tokens.
    dtype = "float32" if model.dtype == "auto" else model.dtype
    return msgspec.structs.replace(model, name=str(ensure_demo_model()), served_name=name, dtype=dtype, enforce_eager=True)


def _worker_name(role: str) -> str:
    return f"{role}-{socket.gethostname()}-{os.getpid()}"


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, metavar="FILE", help="settings (default: ./headstart.yaml, if there is one)")
    common.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key; may be repeated")
    common.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="how much to say (default: info)")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", metavar="NAME_OR_PATH", help="model to serve (default: a small random one, made on the spot)")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    parser = argparse.ArgumentParser(
        prog="headstart",
        description="Disaggregated prefill/decode serving for vLLM: a prompt's prefix is computed once, every worker starts from there.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"headstart {metadata.version('headstart')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("up", parents=[common, model], help="run a whole cluster on this machine until Ctrl-C")
    commands.add_parser("demo", parents=[common, model, as_json], help="run a cluster, show what it saves, check its answers, end")
    commands.add_parser("status", parents=[common, as_json], help="show a node's workers, tiers and counters")
    commands.add_parser("doctor", parents=[common, as_json], help="measure and check what a cluster stumbles over; 1 where something is bad")
    commands.add_parser("config", parents=[common], help="print the whole configuration as it is in force")
    for role, text in _ROLES.items():
        parents = [common, model] if role in ("prefill", "decode") else [common]
        command = commands.add_parser(role, parents=parents, help=text)
        if role in ("prefill", "decode"):
            command.add_argument("--name", help="the worker's name, unique in its node (default: role, host and process)")
        if role == "router":
            command.add_argument("--workers", type=int, metavar="N", help="processes that share the port: the same as --set router.processes=N")
    _add_sim(commands, [common])
    cache_options.add_to(commands, [common, as_json])
    _add_keys(commands, [common, as_json])
    plan_options.add_to(commands, [common, as_json])
    bench = commands.add_parser("bench", help="measure, against plain vLLM and others")
    benches = bench.add_subparsers(dest="bench", required=True, metavar="BENCH")
    prefix = benches.add_parser("prefix", parents=[common, model, as_json], help="time to first token by prompt length: cold and hit")
    prefix.add_argument("--lengths", default="512,700,2048,2300,8192,8400", help="prompt lengths in tokens (default: %(default)s)")
    prefix.add_argument("--runs", type=int, default=5, help="measurements of each figure (default: %(default)s)")
    prefix.add_argument("--systems", default="vllm,headstart,lmcache", help="what to measure (default: %(default)s)")
    prefix.add_argument("--lmcache-python", type=Path, metavar="PATH", help="a Python that has vLLM and LMCache (default: this one)")
    prefix.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there, too")
    hits = benches.add_parser("hits", parents=[common, model, as_json], help="the same inside the engine, without HTTP, text and routing")
    hits.add_argument("--lengths", default="2048,8192,32768,131072", help="prompt lengths in tokens (default: %(default)s)")
    hits.add_argument("--runs", type=int, default=3, help="measurements of each figure (default: %(default)s)")
    hits.add_argument("--systems", default="vllm,headstart,vllm-offloading,lmcache-server", help="what to measure (default: %(default)s)")
    hits.add_argument("--hit-runs", type=int, default=0, help="measurements of each hit (default: as --runs)")
    hits.add_argument("--tiers", default="", help="from which tiers below DRAM ours is asked for, too: nvme, redis (default: none)")
    hits.add_argument("--restart", action="store_true", help="ours and LMCache's server: also after the engine was killed and started again")
    hits.add_argument("--load-format", default="auto", help="vLLM's; dummy: weights that it makes up (default: %(default)s)")
    hits.add_argument("--logs", type=Path, metavar="DIR", help="keep the engines' output there")
    hits.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there, too")
    _add_tiers(benches, [common, as_json])
    _add_routing(benches, [common, as_json])
    _add_router(benches, [common, as_json])
    bench_options.add_to(benches, common, [model, as_json])
    return parser


def _add_routing(benches: Any, parents: list[argparse.ArgumentParser]) -> None:
    text = "hit rate and time to first token of a trace replayed through gateways on simulated workers"
    routing = benches.add_parser("routing", parents=parents, help=text, description=text)
    routing.add_argument("--trace", type=Path, required=True, metavar="FILE", help="arrivals in Mooncake's format, .jsonl or .jsonl.gz")
    routing.add_argument("--requests", type=int, default=3000, help="how many of them, from the first on (default: %(default)s)")
    routing.add_argument("--rate", type=float, default=1.0, help="how many times faster than in the trace they arrive (default: %(default)s)")
    routing.add_argument("--check", type=int, default=200, metavar="N", help="answers held against the oracle (default: %(default)s)")
    _add_simulated(routing, prefill=4, decode=8, speed=1.0)


def _add_router(benches: Any, parents: list[argparse.ArgumentParser]) -> None:
    text = "what a gateway itself costs: processor time for a request, and the time it adds to one"
    router = benches.add_parser("router", parents=parents, help=text, description=text)
    router.add_argument("--tokens", default="32,2400,128000", help="prompt lengths; a token is four bytes of the body (default: %(default)s)")
    router.add_argument("--clients", type=int, default=32, metavar="N", help="clients at once (default: %(default)s)")
    router.add_argument("--requests", type=int, default=500, metavar="N", help="of each size, a fifth of the longest (default: %(default)s)")
    router.add_argument("--runs", type=int, default=3, help="measurements of each figure (default: %(default)s)")
    processes = "requests a second of Headstart's router with so many processes, each on a core of its own, such as 1,2,4 (default: not measured)"
    router.add_argument("--processes", default="", metavar="N,N", help=processes)
    _add_simulated(router, prefill=1, decode=2, speed=100.0)


def _add_simulated(parser: argparse.ArgumentParser, *, prefill: int, decode: int, speed: float) -> None:
    """What benchmarks of gateways on simulated workers have in common."""
    parser.add_argument("--speed", type=float, default=speed, help="how many times faster time passes for the workers (default: %(default)s)")
    parser.add_argument("--prefill", type=int, default=prefill, metavar="N", help="prefill workers (default: %(default)s)")
    parser.add_argument("--decode", type=int, default=decode, metavar="N", help="decode workers (default: %(default)s)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="the workers' rates and sizes, as headstart sim takes it")
    parser.add_argument("--region-gb", type=float, default=2.0, metavar="GB", help="the simulated DRAM tier; 16 bytes a token (default: %(default)s)")
    systems = "headstart, vllm-router or smg, each with :POLICY if it is not its own, with commas (default: %(default)s)"
    parser.add_argument("--systems", default="headstart", help=systems)
    for gateway in ("vllm-router", "smg"):
        parser.add_argument(f"--{gateway}", type=Path, metavar="PATH", help=f"the executable {gateway}")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the processes' output there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there, too")


def _add_tiers(benches: Any, parents: list[argparse.ArgumentParser]) -> None:
    tiers = benches.add_parser("tiers", parents=parents, help="bytes per second of each tier, beside the host's limit and LMCache")
    tiers.add_argument("--chunk-mb", default="4,32", help="sizes of a chunk in MiB (default: %(default)s)")
    tiers.add_argument("--gb", type=float, default=1.0, help="gigabytes that each measurement moves (default: %(default)s)")
    tiers.add_argument("--runs", type=int, default=5, help="measurements of each figure (default: %(default)s)")
    tiers.add_argument("--folder", type=Path, metavar="DIR", help="where the NVMe tier's files go for the time (default: the system's /tmp)")
    tiers.add_argument("--redis-url", default="", metavar="URL", help="a Redis that runs, redis://HOST:PORT/0 (default: one of its own)")
    tiers.add_argument("--lmcache-python", type=Path, metavar="PATH", help="a Python that has LMCache (default: LMCache is left out)")
    tiers.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there, too")


def _add_sim(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    text = "run workers without a model: a real worker's HTTP, bus traffic and bytes, with times from a profile"
    sim = commands.add_parser("sim", parents=parents, help=text, description=text)
    sim.add_argument("--role", choices=("prefill", "decode"), default="decode", help="what the workers are (default: %(default)s)")
    sim.add_argument("--workers", type=int, default=1, metavar="N", help="how many, all in this process (default: %(default)s)")
    sim.add_argument("--name", help="their name, a number is added to each of several (default: sim, role, host and process)")
    sim.add_argument("--port", type=int, default=0, help="port of the one worker's HTTP server; 0: a free one (default: %(default)s)")
    sim.add_argument("--profile", type=Path, metavar="FILE", help="the engine's rates and sizes, TOML or JSON (default: an 8B model on an H200)")
    sim.add_argument("--speed", type=float, default=1.0, help="how many times faster than the profile time passes (default: %(default)s)")


def _add_keys(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    keys = commands.add_parser("keys", help="make the keys by which nodes and routers know each other, and those of tenants")
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    texts = {
        "init": "make a cluster's folder, which stays with the operator",
        "add": "make a member's folder, which goes to its machine as security.keys_dir",
        "list": "show the members",
        "revoke": "remove a member: the others refuse it a second after they got their folders again",
    }
    for action, text in texts.items():
        command = actions.add_parser(action, parents=parents, help=text, description=text)
        command.add_argument("folder", type=Path, metavar="DIR", help="the cluster's folder")
        if action in ("add", "revoke"):
            command.add_argument("name", metavar="NAME", help="the member's name, as cache.peers has it before the @")
        if action == "add":
            command.add_argument("--role", choices=("node", "router"), default="node", help="what it may do (default: %(default)s)")
    text = "make an API key for a tenant: it is shown once, its hash goes into the tenants' file"
    tenant = actions.add_parser("tenant", parents=parents, help=text, description=text)
    tenant.add_argument("name", metavar="NAME", help="the tenant, new or known")
    tenant.add_argument("--file", type=Path, metavar="FILE", help="the tenants' file (default: security.tenants_file)")


if __name__ == "__main__":
    sys.exit(main())
