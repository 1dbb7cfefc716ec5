#!/bin/bash
# build.sh WORKTREE: CPU build in place through ccache
cd "$1" || exit 1
export PATH=/usr/lib/ccache:$PATH CCACHE_BASEDIR=/work CCACHE_NOHASHDIR=1 CCACHE_SLOPPINESS=time_macros,include_file_ctime,include_file_mtime FORCE_CPU=1 MAX_JOBS=${MAX_JOBS:-2}
exec .venv/bin/python setup.py -q build_ext --inplace
