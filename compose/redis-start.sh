#!/bin/sh
# Starts Valkey or Redis, whichever the image has, in place of this shell, so that it hears that it shall end.
# The password goes in over a pipe: a command line may be read by every process of the machine.
server=$(command -v valkey-server || command -v redis-server) || exit 127
exec "$server" - <<END
$(cat /etc/headstart/redis.conf)
maxmemory $MAXMEMORY
requirepass $(cat /run/secrets/redis-password)
END
