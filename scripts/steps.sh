# shellcheck shell=bash
# The steps of gpu_check.sh and amx_check.sh, which read this file. Before, they set
#
#   out     the folder of the logs and of summary.txt
#   failed  0; 1 after a step that fails
#   width   of the names in the table
#   total   seconds that all steps may take together; 0: each has its own limit alone

began=$(date +%s)
: > "$out/summary.txt"

say() { echo "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: never longer than what is left of the whole. MLLAMA_STEPS: names of steps, to run these alone
step() {
  local name=$1 limit=$2 start code word left
  shift 2
  [[ -z "${MLLAMA_STEPS:-}" || " $MLLAMA_STEPS " == *" $name "* ]] || return 0
  if [ "$total" -gt 0 ]; then
    left=$((total - ($(date +%s) - began)))
    if [ "$left" -lt 5 ]; then say "$(printf "%-${width}s not run: the time is up" "$name")"; failed=1; return 0; fi
    limit=$((limit < left ? limit : left))
  fi
  start=$(date +%s)
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
  code=$?
  case $code in
    0) word=ok ;;
    77) word="not possible here" ;;
    124 | 137) word="STOPPED after its time limit" failed=1 ;;
    *) word="FAILED ($code)" failed=1 ;;
  esac
  say "$(printf "%-${width}s %4d s  %-28s %s" "$name" "$(($(date +%s) - start))" "$word" "$(tail -1 "$out/$name.log" | cut -c1-110)")"
}
