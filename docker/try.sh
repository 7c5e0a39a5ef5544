#!/usr/bin/env bash
# Build the images, run the main job through compose.yaml, look into its containers, and take away all that it made but the
# images: `make containers`. Name, ports, passwords and volumes are its own, so that a stack that is up stays as it is.
# Further compose files: COMPOSE_FILE=docker/compose.yaml:more.yaml docker/try.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export COMPOSE_ANSI=never COMPOSE_FILE=${COMPOSE_FILE:-docker/compose.yaml} COMPOSE_PROJECT_NAME=teacher-cache-try
export PREFECT_PORT=${PREFECT_PORT:-14200} S3_PORT=${S3_PORT:-18333} CACHE_BUCKET=caches AWS_ACCESS_KEY_ID=try
secret() { head -c 18 /dev/urandom | base64; }
DATA=$(mktemp -d) POSTGRES_PASSWORD="$(secret)@/" AWS_SECRET_ACCESS_KEY=$(secret)
export DATA POSTGRES_PASSWORD AWS_SECRET_ACCESS_KEY

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }

remove() {
    local code=$?
    ((code == 0)) || docker compose logs --no-color --tail 20 >&2 || true
    docker compose down --volumes 2>"$DATA/down" || { cat "$DATA/down" && code=1; }
    for kind in container volume network; do
        if test -n "$(docker "$kind" ls --quiet --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME")"; then
            say "a $kind of $COMPOSE_PROJECT_NAME is left" && code=1
        fi
    done
    rm -r "$DATA"
    say "removed; exit code $code"
    exit "$code"
}
trap remove EXIT

deployment() {
    local name=$1 start=$SECONDS
    shift
    docker compose exec -T worker prefect deployment run "$name/default" --watch "$@" >"$DATA/run" 2>&1 || { cat "$DATA/run" && return 1; }
    say "$name: $((SECONDS - start)) s"
}

# from inside as its user, from outside as root: rights, licences, passwords, what builds leave behind
look_into() {
    docker compose exec -T "$1" python - <docker/look_into.py
    local container image
    container=$(docker compose ps --quiet "$1")
    image=$(docker inspect --format '{{.Image}}' "$container")
    if docker image inspect "$image" | grep --quiet --fixed-strings -e "$POSTGRES_PASSWORD" -e "$AWS_SECRET_ACCESS_KEY"; then
        say "the image of $1 holds a password" && return 1
    fi
    docker export "$container" | tar --list >"$DATA/files"
    if grep -E '^(root|home/[^/]+)/\.cache/|^var/lib/apt/lists/.+_|^var/cache/apt/.+\.(bin|deb)$|^(build|wheels)/.|\.env$' "$DATA/files"; then
        say "these files of the build are in the image of $1" && return 1
    fi
    say "$1: $(docker image inspect --format '{{.Size}}' "$image" | numfmt --to=si)B, $(wc -l <"$DATA/files") files, as it should be"
}

for service in server worker; do
    start=$SECONDS
    docker compose build --quiet "$service"
    say "image of $service: $((SECONDS - start)) s"
done
docker compose up --detach 2>"$DATA/up" || { cat "$DATA/up" && exit 1; }
until test "$(docker compose ps --format '{{.Health}}' worker)" = healthy; do
    ((SECONDS < 3600)) && test -n "$(docker compose ps --quiet worker)" && sleep 2
done
say "all services are healthy"
curl --fail --silent --location --output "$DATA/ui" "http://127.0.0.1:$PREFECT_PORT/"
deployment precompute-teacher -p cache=s3://caches/try.cache -p 'dataset=scenes:caches/scenes?train=96&dev=8&test=24'
deployment train-student -p cache=s3://caches/try.cache -p epochs=2 -p out=runs/try
deployment evaluate-student -p run=runs/try
deployment deploy-student -p run=runs/try
docker compose exec -T worker teacher-cache verify s3://caches/try.cache
look_into server
look_into worker
