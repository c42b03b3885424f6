"""The errors of the cache bus, by cause. Every message says what is wrong and what to change."""


class HeadstartError(Exception):
    """Root of every error that Headstart raises on purpose."""


class SettingsError(HeadstartError):
    """A configuration that can't be used; the message names each key, its line and what would be right."""


class BusError(HeadstartError):
    """The cache bus can't do what was asked."""


class BusUnavailable(BusError):
    """No daemon answers at the run directory within the deadline."""


class ProtocolError(BusError):
    """A message that does not decode, or one of another protocol version."""


class Refused(BusError):
    """The daemon refuses a registration: two workers disagree on what their KV means."""


class RegionError(BusError):
    """The shared memory region can't be made, adopted or mapped."""


class HandoverError(BusError):
    """Another engine's memory can't be read from here; what it offered comes through the region."""


class UnsupportedModel(HeadstartError):
    """A model, layout or parallelism whose KV layout is not proven; named so that silence can't corrupt KV."""


class TierError(BusError):
    """A tier below DRAM can't be used; the node goes on without it."""


class ArchiveError(BusError):
    """A file of chunks that can't be used: it is none, it is cut or damaged, or it belongs to another cluster."""
