"""``headstart doctor``: the field's known traps as checks with advice.

``measure_*`` look at the machine, its disk, Redis, the running bus and the peers, and return ``facts``. ``check_*`` are pure functions from
facts to findings. ``run`` puts them together.
"""
