"""The manifests start what there is: arguments go through the command line's parser, the ConfigMap and variables through the settings'."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from rendering import VARIANTS, Object, containers, environment, pods, settings_text, variant

from cachebus.errors import SettingsError
from cachebus.settings_file import load_settings
from deploy.cli import _parser
from deploy.settings import Settings

FIELDS = {"status.podIP": "10.1.2.3", "metadata.name": "headstart-prefill-0"}


def headstart_containers(objects: list[Object]) -> list[tuple[str, Object, Object]]:
    """Name, container and pod of all that run a command of Headstart."""
    found = [(f"{name}/{c['name']}", c, pod) for name, pod in pods(objects) for c in containers(pod)]
    return [(name, c, pod) for name, c, pod in found if "command" not in c]


def settings_of(objects: list[Object], container: Object) -> Settings:
    return load_settings(Settings, settings_text(objects), "headstart.yaml", environment(container, FIELDS))


def expanded(argument: str, values: Mapping[str, str]) -> str:
    """An argument as Kubernetes gives it: $(NAME) is the variable's value."""
    return re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], argument)


@pytest.mark.parametrize("name", VARIANTS)
def test_arguments_parse(name: str) -> None:
    objects = variant(name)
    roles = set()
    for _, container, _ in headstart_containers(objects):
        values = environment(container, FIELDS)
        options = _parser().parse_args([expanded(argument, values) for argument in container["args"]])
        roles.add(options.command)
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert str(options.config.parent) in mounts
        assert options.config.name == "headstart.yaml"
    assert roles == {"router", "cachebus", "prefill", "decode"}


@pytest.mark.parametrize("name", VARIANTS)
def test_settings_are_taken_and_fit_the_container(name: str) -> None:
    objects = variant(name)
    for where, container, pod in headstart_containers(objects):
        settings = settings_of(objects, container)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        role = container["args"][0]
        if role == "cachebus":
            following = where == "headstart-router/cachebus"
            assert ports["bus-metrics"] == settings.cache.metrics_port
            assert settings.cache.metrics_host == FIELDS["status.podIP"]
            assert settings.cache.peer_workers == following
            assert settings.cache.node_port == (0 if following else ports["node"])
            assert following or settings.cache.node_host == FIELDS["status.podIP"]
            assert settings.cache.peers_dns.endswith(f"-nodes:{7000}")
            assert following or not settings.cache.local_disk or "nvme" in {mount["name"] for mount in container["volumeMounts"]}
            check_region(container, pod, settings)
        elif role == "router":
            assert (settings.router.port, settings.router.host) == (ports["http"], "0.0.0.0")
            assert pod["terminationGracePeriodSeconds"] > settings.router.drain_seconds_max + 5
        else:
            pool = settings.prefill if role == "prefill" else settings.decode
            assert (pool.port, pool.metrics_port, pool.host) == (ports["http"], ports["metrics"], FIELDS["status.podIP"])
            assert pod["terminationGracePeriodSeconds"] >= pool.drain_seconds_max + 45
            startup = container["startupProbe"]
            assert startup["periodSeconds"] * startup["failureThreshold"] > pool.start_seconds_max
        assert mounted(container, settings.cache.run_dir)
        assert mounted(container, settings.cache.region_path) or role == "router"


def check_region(container: Object, pod: Object, settings: Settings) -> None:
    """The region has room in its volume and in the container's memory."""
    need = settings.cache.max_local_cpu_size * 1e9 / 2**20
    memory = int(container["resources"]["limits"]["memory"].removesuffix("Mi"))
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "region"]
    assert memory - need >= 256
    if "emptyDir" in volume:
        assert volume["emptyDir"]["medium"] == "Memory"
        assert int(volume["emptyDir"]["sizeLimit"].removesuffix("Mi")) > need


def mounted(container: Object, path: str) -> bool:
    return any(path.startswith(f"{mount['mountPath']}/") for mount in container["volumeMounts"])


@pytest.mark.parametrize("name", VARIANTS)
def test_worker_and_cachebus_of_a_pod_share_folders_and_user(name: str) -> None:
    for workload, pod in pods(variant(name)):
        ours = [c for c in containers(pod) if c["name"] in ("cachebus", "prefill", "decode", "router")]
        assert pod["securityContext"]["runAsUser"] == 10001 or not ours
        for container in ours:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts["run"] == "/run/headstart", workload
            assert mounts.get("region", "/region") == "/region", workload


def test_a_routers_pod_has_no_key_that_reads_chunks() -> None:
    for name, pod in pods(variant("defaults")):
        if not name.endswith("redis"):
            (keys,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "keys"]
            secrets = {item["key"] for item in keys["items"] if item["key"].endswith(".secret")}
            assert secrets == {"router.secret" if name.endswith("router") else "nodes.secret"}
            assert keys["defaultMode"] == 0o440


def test_values_of_the_production_stack_reach_the_engine() -> None:
    objects = variant("much of it")
    settings = load_settings(Settings, settings_text(objects), "headstart.yaml", {})
    assert (settings.model.tensor_parallel_size, settings.model.kv_cache_dtype, settings.model.served_name) == (2, "fp8", "chat")
    assert settings.prefill.engine_args == ["--max-num-seqs=64"]
    assert settings.cache.remote_url == "rediss://cache.example:6380/0"
    assert settings.router.policy == "prefix_affinity"
    assert not [one for one in objects if one["metadata"]["name"] == "headstart-redis"]


def test_a_service_variable_would_be_refused() -> None:
    """Why enableServiceLinks is off."""
    with pytest.raises(SettingsError, match=r"router\.port"):
        load_settings(Settings, settings_text(variant("defaults")), "headstart.yaml", {"HEADSTART_ROUTER_PORT": "tcp://10.0.0.1:80"})
