#!/bin/sh
# Makes the certificates that test_tls.py uses: two authorities, a server, and a client of each. Valid for 100 years.
set -eu
cd "$(dirname "$0")"
authority() {
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -keyout "$1.key" -out "$1.pem" \
    -subj "/CN=expertd test $1" -addext "basicConstraints=critical,CA:TRUE"
}
signed() { # name authority extensions
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$1.key" -subj "/CN=$1" -out "$1.csr"
  printf '%s' "$3" | openssl x509 -req -in "$1.csr" -CA "$2.pem" -CAkey "$2.key" -CAcreateserial -days 36500 \
    -extfile /dev/stdin -out "$1.pem"
  rm "$1.csr"
}
authority authority
authority stranger
signed server authority "subjectAltName=DNS:localhost,IP:127.0.0.1"
signed client authority "extendedKeyUsage=clientAuth"
signed intruder stranger "extendedKeyUsage=clientAuth"
rm -f ./*.srl authority.key stranger.key
