#!/bin/bash
# sig.sh SIGNAL DIR...: signal to processes that work in DIR
s=$1; shift
for d in "$@"; do for p in /proc/[0-9]*; do c=$(readlink $p/cwd 2>/dev/null); case "$c" in $d|$d/*) kill -$s ${p#/proc/} 2>/dev/null;; esac; done; done
