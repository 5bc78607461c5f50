# Installs what building and testing need beyond Rust: etcd, protoc (for the etcd client), Prometheus, Chromium and a
# Python environment with the real clients that the end-to-end tests drive. Sourced by tests/run.sh and the
# continuous integration. Does nothing where everything is there already.

penstock_packages=()
command -v etcd >/dev/null || penstock_packages+=(etcd-server)
command -v etcdctl >/dev/null || penstock_packages+=(etcd-client)
command -v protoc >/dev/null || penstock_packages+=(protobuf-compiler)
command -v prometheus >/dev/null || penstock_packages+=(prometheus)
command -v chromium >/dev/null || penstock_packages+=(chromium)
command -v chromedriver >/dev/null || penstock_packages+=(chromium-driver)
command -v cc >/dev/null || penstock_packages+=(build-essential)
command -v curl >/dev/null || penstock_packages+=(curl)
python3 -c 'import ensurepip, venv' 2>/dev/null || penstock_packages+=(python3 python3-venv)
if [ "${#penstock_packages[@]}" -gt 0 ]; then
    if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
        echo "missing: ${penstock_packages[*]} (install them, or run this as root on Debian)" >&2
        exit 1
    fi
    echo "installing ${penstock_packages[*]}"
    apt-get update -qq
    # Servers are started by the tests themselves, never as services: Debian asks this file before it starts one.
    penstock_policy=/usr/sbin/policy-rc.d
    if [ -e "$penstock_policy" ]; then
        penstock_policy=
    else
        printf '#!/bin/sh\nexit 101\n' >"$penstock_policy"
        chmod +x "$penstock_policy"
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${penstock_packages[@]}" >/dev/null
    [ -z "$penstock_policy" ] || rm -f "$penstock_policy"
fi

export PENSTOCK_TEST_PYTHON=${PENSTOCK_TEST_PYTHON:-${XDG_CACHE_HOME:-$HOME/.cache}/penstock-test-python}
penstock_requirements=tests/clients/requirements.txt
if ! cmp -s "$penstock_requirements" "$PENSTOCK_TEST_PYTHON/requirements.txt"; then
    echo "installing the Python clients of $penstock_requirements"
    python3 -m venv --clear "$PENSTOCK_TEST_PYTHON"
    "$PENSTOCK_TEST_PYTHON/bin/pip" install --quiet --disable-pip-version-check -r "$penstock_requirements"
    cp "$penstock_requirements" "$PENSTOCK_TEST_PYTHON/requirements.txt"
fi
