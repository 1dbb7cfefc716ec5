#!/bin/bash
# boost.sh DIR: gives processes that work in DIR priority
for p in /proc/[0-9]*; do c=$(readlink $p/cwd 2>/dev/null); case "$c" in $1*) renice -n -15 -p ${p#/proc/} >/dev/null 2>&1;; esac; done
