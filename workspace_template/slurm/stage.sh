# Read by every script here: the environment, and `stage`, which gives one command as a step of a job.

{% for line in setup %}
{{ line }}
{% endfor %}
set -uo pipefail
export HF_HUB_OFFLINE=1  # nothing is fetched on compute nodes: `fedcollm prefetch` does that, where there is a network
{% if cpus %}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
{% endif %}

# stage COMMAND ...: fedcollm COMMAND ... as a step of this job, which srun hands Slurm's signals to. If it fails, the job
# goes back into the queue or ends with its exit code; `tolerates=3 stage ...` goes on after exit code 3.
stage() {
{% if processes > 1 %}
    case $* in
        *"--phase capture"*) srun --ntasks=1 fedcollm "$@" ;;
        client-train* | co-distill* | {{ "client-distill* | " if in_public }}evaluate*)  # by {{ processes }} processes, which find each other as torchrun's do
            export MASTER_ADDR=localhost MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
            srun --ntasks={{ processes }} --kill-on-bad-exit=0 --wait=0 slurm/rank.sh fedcollm "$@" --processes {{ processes }} ;;
        *) srun --ntasks=1 fedcollm "$@" ;;
    esac
{% else %}
    srun --ntasks=1 fedcollm "$@"
{% endif %}
    local code=$?
    case "$code $1" in
        "0 $1" | "${tolerates:-0} $1") return ;;
        "75 client-train" | "75 co-distill"{{ ' | "75 client-distill"' if in_public }})    # told to stop, as before the time limit: goes on from its checkpoint
            again "stopped before its end" ;;
        [2456]" $1") ;;                         # would end so again: settings, damage, refusal, numbers
        *)                                      # a crash, a kill, a full disk, a file that is late: up to {{ retries }} times
            echo "$code" >> "slurm/logs/$(own_number).failures"
            [ "$(wc -l < "slurm/logs/$(own_number).failures")" -gt {{ retries }} ] || again "exit code $code" ;;
    esac
    exit "$code"
}

# Puts this job back into the queue. It keeps its number, so that the jobs after it go on waiting for it.
again() {
    echo "$(date +%FT%T) $1: back into the queue"
    scontrol requeue "$(own_number)" && sleep 300    # until Slurm ends this script
}

# The job's number, or 12_3 for a task of an array: a bare number can mean all of its tasks.
own_number() {
    echo "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
}
