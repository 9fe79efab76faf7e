#!/bin/sh
# proto.sh generate|check BIN
#   generate  write client/expertd/v1 from proto/
#   check     lint proto/, refuse breaking changes since the last release, fail when client/expertd/v1 is stale
# BIN is the directory that holds buf.
#
# Stubs come from grpcio-tools 1.71.2 in a virtual environment of its own: what it generates imports under
# protobuf 5.29 to 7.x, while the newest generator would force the newest protobuf on every worker.
set -eu
mode=$1 bin=$2
cd "$(dirname "$0")/.."
venv=.venv-proto

if [ ! -x $venv/bin/python ] || ! $venv/bin/python -c 'import grpc_tools' 2>/dev/null; then
  python3 -m venv $venv
  $venv/bin/python -m pip install --quiet --disable-pip-version-check grpcio-tools==1.71.2 'setuptools<81'
fi

generate() { # generate DIR
  $venv/bin/python -W ignore -m grpc_tools.protoc -I proto --python_out="$1" --pyi_out="$1" --grpc_python_out="$1" \
    expertd/v1/expertd.proto
}

case $mode in
  generate) generate client ;;
  check)
    "$bin/buf" lint proto
    "$bin/buf" format --diff --exit-code proto
    release=$(git tag --list 'v*' --sort=-v:refname 2>/dev/null | head -n 1)
    if [ -n "$release" ]; then "$bin/buf" breaking proto --against ".git#tag=$release,subdir=proto"
    else echo "buf breaking: no release tag yet, nothing to compare with"; fi
    fresh=$(mktemp -d) && trap 'rm -rf "$fresh"' EXIT
    generate "$fresh"
    for file in expertd_pb2.py expertd_pb2.pyi expertd_pb2_grpc.py; do
      diff -u "client/expertd/v1/$file" "$fresh/expertd/v1/$file" || { echo "stale: run 'make proto'" >&2; exit 1; }
    done ;;
  *) echo "usage: proto.sh generate|check BIN" >&2; exit 2 ;;
esac
