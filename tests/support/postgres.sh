#!/bin/sh
# A PostgreSQL server that lives for as long as this script's standard input is open: a test that ends, panics or is
# killed closes it. The first line out is `ready DIRECTORY`, with the socket in that directory, or what went wrong.
#
#   sh postgres.sh BIN      BIN has the server's programs
set -eu
export LC_ALL=C
cd /
exec 2>&1

bin=$1
server=
ready=
directory=$(mktemp -d "${TMPDIR:-/tmp}/resile-postgres.XXXXXX")

# The server is told to leave at once: its data is worth nothing, and it still gives its shared memory back.
finish() {
    set +e
    trap - EXIT
    [ -z "$server" ] || { kill -QUIT "$server" && wait "$server"; }
    [ -n "$ready" ] || cat "$directory/log"
    rm -rf "$directory"
}
trap finish EXIT
# A test that was killed reads nothing any more, so a broken pipe is one of them.
trap 'exit 1' HUP INT PIPE TERM

"$bin/initdb" --pgdata="$directory/data" --username=postgres --auth=trust --encoding=UTF8 --locale=C \
    --no-sync --no-instructions >"$directory/log" 2>&1

# Only the socket, so that no port can be taken by somebody else; nothing that is to outlive a crash of the machine;
# no memory shared by name outside of the directory.
"$bin/postgres" -D "$directory/data" -k "$directory" -p 5432 -c listen_addresses= -c max_connections=20 \
    -c fsync=off -c full_page_writes=off -c wal_level=minimal -c max_wal_senders=0 -c autovacuum=off \
    -c shared_buffers=2MB -c dynamic_shared_memory_type=mmap >"$directory/log" 2>&1 &
server=$!

tries=0
until "$bin/pg_isready" --quiet --host="$directory" --port=5432; do
    kill -0 "$server"
    tries=$((tries + 1))
    [ "$tries" -le 500 ]
    sleep 0.01
done

ready=yes
echo "ready $directory"
read -r _ || true
