"""The vLLM face: translates vLLM's connector hooks to the two halves, and decides nothing itself.

vLLM makes it twice, in two processes: with role SCHEDULER in the engine core, with role WORKER in each worker. Written
for vLLM 0.25.1 and 0.32.0; where the two call hooks in another order or not at all, the hook says so.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from blake3 import blake3
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.request import RequestStatus

from cachebus.client import BusClient
from cachebus.engine import process_tree, support
from cachebus.engine.blocks import open_blocks
from cachebus.engine.break_even import PullTook, StepTook
from cachebus.engine.idle import limit_idle_spin
from cachebus.engine.mover import IDLE_WAIT_SECONDS, Mover, took_since
from cachebus.engine.namespace import layout_digest, layout_parts, namespace_parts
from cachebus.engine.publisher import CONNECT_MS_MAX, Publisher
from cachebus.engine.scheduler_half import SchedulerHalf
from cachebus.engine.statistics import HeadstartPromMetrics, HeadstartStats
from cachebus.engine.transfer import PARAMS_KEY, StepPlan, transfer_params
from cachebus.engine.views import Policy, RequestView, Scheduled
from cachebus.errors import UnsupportedModel
from cachebus.holder import HOLDER_NAME_LENGTH, Holder
from cachebus.keeper import Keeper
from cachebus.keys import namespace_digest
from cachebus.messages import Reattach, RegisterEngine
from cachebus.region import Region
from cachebus.wire import Role

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_TURN_SECONDS = 0.0005
"""How long a thread keeps the interpreter while another waits for it. At Python's own 5 ms a copier that computes addresses may cost
the engine, or the engine a copier, more than the copy of a thousand tokens takes."""


class ConnectorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ``headstart`` part of ``kv_connector_extra_config``; sizes in tokens."""

    run_dir: str
    worker: str
    role: Role
    model: str
    chunk_size: int
    save_decode_cache: bool
    lookup_ms_max: int
    pull_tokens_min: int
    promote_ms_max: int
    verify_digests: bool
    hold_ms: int = 0
    """How long what is computed is offered from the engine's own blocks, and those are kept; 0: it goes through the region alone"""
    hold_gb: float = 0.0
    adapters: dict[str, str] = {}
    """Digests of LoRA adapters by name; the KV of one that is not named here is left alone"""


@dataclass
class StepMetadata(KVConnectorMetadata):
    """vLLM's envelope for a step's plan."""

    plan: StepPlan


@dataclass
class LayoutMetadata(KVConnectorHandshakeMetadata):
    """What the worker tells the scheduler once its KV cache exists."""

    parts: dict[str, str]
    block_bytes: int


@dataclass
class TookMetadata(KVConnectorWorkerMetadata):
    """vLLM's envelope for what steps and pulls took in the workers."""

    samples: list[StepTook | PullTook]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> TookMetadata:
        assert isinstance(other, TookMetadata)
        return TookMetadata(self.samples + other.samples)


class HeadstartConnector(KVConnectorBase_V1, SupportsHMA):
    """Pulls known prefixes from the region and publishes computed ones into it."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._settings = msgspec.convert(extra[PARAMS_KEY], ConnectorSettings)
        support.check_config(vllm_config, self._settings.chunk_size)
        self._spec = support.proven_spec(kv_cache_config)
        self._block_size: int = vllm_config.cache_config.block_size
        self._num_blocks: int = kv_cache_config.num_blocks
        self._run_dir = Path(self._settings.run_dir)
        engine_id, ranks = vllm_config.kv_transfer_config.engine_id, vllm_config.parallel_config.tensor_parallel_size
        self._holders = [_holder_name(engine_id, rank) for rank in range(ranks)]
        self._rank = get_tensor_model_parallel_rank() if role is KVConnectorRole.WORKER else 0
        self._label = self._settings.worker + (f" rank {self._rank}" if self._rank else "")
        self._holder = Holder(self._run_dir, self._holders[self._rank])
        process_tree.die_with_parent()
        if os.getppid() == 1:
            raise SystemExit("the parent process is gone already")
        if vllm_config.device_config.device_type == "cpu":
            limit_idle_spin()
        else:
            sys.setswitchinterval(_TURN_SECONDS)
        self._client = BusClient(self._run_dir, f"{self._label} {role.name.lower()}", self._holder)
        self._welcome = self._client.connect(CONNECT_MS_MAX)
        self._keeper: Keeper | None = None
        self._half: SchedulerHalf | None = None
        self._block_pool: BlockPool | None = None
        self._mover: Mover | None = None
        self._publisher: Publisher | None = None
        self._invalid: set[int] = set()
        self._reported: dict[str, float] = {}
        if role is KVConnectorRole.SCHEDULER:
            self._namespace_parts = namespace_parts(vllm_config)

    # Scheduler side.

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Called once, after the KV cache was made: the layout is known, so the engine can register."""
        layout = metadata[0]
        assert isinstance(layout, LayoutMetadata)
        if any(other != layout for other in metadata.values()):
            raise UnsupportedModel("tensor-parallel ranks whose KV lies differently are not supported yet")
        settings = self._settings
        namespace = namespace_digest(self._namespace_parts)
        registration = RegisterEngine(
            worker=settings.worker,
            role=settings.role,
            holder=self._holder.id,
            model=settings.model,
            namespace=namespace,
            namespace_parts=self._namespace_parts,
            layout=layout_digest(layout.parts),
            layout_parts=layout.parts,
            block_size=self._block_size,
            chunk_size=settings.chunk_size,
            chunk_bytes=layout.block_bytes * (settings.chunk_size // self._block_size),
        )
        self._client.call(registration, CONNECT_MS_MAX)
        self._keeper = Keeper(self._run_dir, f"{settings.worker} engine", self._holder, lambda: registration, self._welcome.epoch)
        self._keeper.start()
        policy = Policy(
            worker=settings.worker,
            holders=self._holders,
            namespace=namespace,
            layout=registration.layout,
            chunk_size=settings.chunk_size,
            block_size=self._block_size,
            save_decode_cache=settings.save_decode_cache,
            lookup_ms_max=settings.lookup_ms_max,
            pull_tokens_min=settings.pull_tokens_min,
            hold_ms=settings.hold_ms,
            hold_blocks_max=int(settings.hold_gb * 1e9 / layout.block_bytes),
        )
        self._half = SchedulerHalf(policy, self._client)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not published is a miss later, nothing worse."""
        return False

    def on_new_request(self, request: Request) -> None:
        adapter = self._adapter(request)
        if self._half is None or adapter is None or not _is_cacheable(request):
            return
        self._half.add(
            RequestView(
                request_id=request.request_id,
                tokens=request.all_token_ids,
                prompt_tokens=request.num_prompt_tokens,
                salt=request.cache_salt or "",
                may_pull=not request.skip_reading_prefix_cache,
                transfer=transfer_params(request.kv_transfer_params),
                adapter=adapter,
            )
        )

    def _adapter(self, request: Request) -> str | None:
        """What of an adapter goes into the request's keys: "" without one, None where its KV has no name."""
        return self._settings.adapters.get(request.lora_request.lora_name) if request.lora_request else ""

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._half is None:
            return 0, False
        free = self._block_pool.get_num_free_blocks() if self._block_pool is not None else sys.maxsize
        found = self._half.matched(request.request_id, num_computed_tokens, time.monotonic() * 1000, free)
        return found, bool(found)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self._half is not None:
            self._half.allocated(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        if self._half is None:
            return StepMetadata(StepPlan())
        plan = self._half.step(_scheduled(scheduler_output), scheduler_output.preempted_req_ids or ())
        plan.let_go = self._half.holds.over(time.monotonic() * 1000)
        return StepMetadata(plan)

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._block_pool = gpu_block_pool

    def has_pending_push_work(self) -> bool:
        """Whether the engine has something left to do though no request is under way: KV events leave with a step, and no step follows
        when an idle engine's prefix cache is reset."""
        return self._block_pool is not None and bool(self._block_pool.kv_event_queue)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """True keeps the blocks until ``get_finished`` names the request: vLLM steps until then also where nothing else is to be done."""
        whole = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        return self._half is not None and self._half.finished(request.request_id, whole=whole), None

    def request_finished_all_groups(self, request: Request, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        settings = self._settings
        self._layout = layout_parts(kv_caches, self._spec, self._block_size)
        region = Region.map(Path(self._welcome.region_path))
        self._blocks = open_blocks(kv_caches, self._num_blocks, region.data)
        mover = Mover(
            self._run_dir,
            self._holder,
            self._label,
            self._blocks,
            region,
            verify=settings.verify_digests,
            wait_ms_max=settings.promote_ms_max,
            take_offers=settings.hold_ms > 0,
        )
        mover.start()
        layout = layout_digest(self._layout)
        publisher = Publisher(self._run_dir, self._holder, self._label, layout, self._blocks, region, rank=self._rank, offer=settings.hold_ms > 0)

        def reattach() -> Reattach:
            return Reattach(self._holder.id, mover.reading(), publisher.writing)

        self._keeper = Keeper(self._run_dir, f"{self._label} worker", self._holder, reattach, self._welcome.epoch)
        self._keeper.start()
        self._mover, self._publisher = mover, publisher

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return LayoutMetadata(self._layout, self._blocks.block_bytes)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Called before the forward pass in both versions, so the extents are there when it ends."""
        super().bind_connector_metadata(connector_metadata)
        if self._publisher is not None:
            self._publisher.begin(self._plan())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Called before the forward pass in 0.25.1 and after it in 0.32.0: it only queues."""
        if self._mover is None:
            return
        if loads := [load for load in self._plan().loads if load.rank == self._rank]:
            computed = self._blocks.computed()
            for load in loads:
                self._mover.submit(load, computed)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request is scheduled when its load has ended."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Chunks are published whole, when the step ends."""

    def wait_for_save(self) -> None:
        """Called when the forward pass has ended; 0.25.1 leaves it out in steps without one, which complete no chunk."""
        if self._publisher is not None:
            self._publisher.finish()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._mover is None:
            return None, None
        plan = self._plan()
        finished, self._invalid = self._mover.take_finished(IDLE_WAIT_SECONDS if plan.idle else 0)
        return set(plan.let_go) or None, finished or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Those of the loads that ``get_finished`` reported just before."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def get_kv_connector_stats(self) -> HeadstartStats | None:
        if self._half is not None:
            totals: dict[str, float] = {"declined_chunks": self._half.declined_chunks}
        elif self._mover is not None and self._publisher is not None:
            totals = {**self._mover.counts, **self._publisher.counts}
        else:
            return None
        fresh = {name: value - self._reported.get(name, 0) for name, value in totals.items()}
        self._reported = totals
        return HeadstartStats(data=fresh) if any(fresh.values()) else None

    def build_connector_worker_meta(self) -> TookMetadata | None:
        """What steps and pulls took since the last call, for the scheduler half to judge pulls by."""
        if self._mover is None or self._publisher is None:
            return None
        samples = took_since(self._publisher, self._mover)
        return TookMetadata(samples) if samples else None

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Scheduler side: what the workers' last step said."""
        if self._half is None:
            return
        self._half.loaded(connector_output.finished_recving or ())
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, TookMetadata):
            self._half.took(meta.samples, time.monotonic() * 1000)

    # Both.

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HeadstartStats:
        return HeadstartStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> HeadstartPromMetrics:
        return HeadstartPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def reset_cache(self) -> bool | None:
        """The region belongs to the node, not to this engine: resetting the engine's own cache leaves it alone."""
        return None

    def shutdown(self) -> None:
        for part in (self._keeper, self._mover):
            if part is not None:
                part.stop()
        if self._publisher is not None:
            self._publisher.close()
        self._client.close()
        self._holder.close()

    def _plan(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.plan


def _holder_name(engine_id: str, rank: int) -> str:
    """vLLM gives every process of one engine the same id. Each rank reads and writes under a name of its own, the scheduler under the first's.

    The processes of one engine die together, so a lease that the scheduler takes for a rank ends with that rank.
    """
    return blake3(f"{engine_id} {rank}".encode()).hexdigest()[:HOLDER_NAME_LENGTH]


def _is_cacheable(request: Request) -> bool:
    """Whether the request's KV depends on its token ids, and an adapter, alone."""
    return not (request.mm_features or request.prompt_embeds is not None or request.pooling_params)


def _scheduled(output: SchedulerOutput) -> Iterable[Scheduled]:
    for new in output.scheduled_new_reqs:
        # On the V2 runner a resumed request comes as a new one: its blocks replace what was known.
        yield Scheduled(new.req_id, new.block_ids[0], True, new.num_computed_tokens, output.num_scheduled_tokens[new.req_id])
    cached = output.scheduled_cached_reqs
    for request_id, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
        restarted = request_id in cached.resumed_req_ids
        yield Scheduled(request_id, blocks[0] if blocks else [], restarted, computed, output.num_scheduled_tokens[request_id])
