#!/usr/bin/env bash
# Puts together what the C++ library is built with, where the machine has none of it. Nothing is installed.
#
#     cpp/dependencies.sh FOLDER
#
#     FOLDER/include   headers of ONNX Runtime and nlohmann-json, out of Debian's packages, from the mirror that this machine's apt uses
#     FOLDER/lib       links to the shared library of ONNX Runtime in the Python package onnxruntime (of $PYTHON, python3 by default);
#                      newer libraries serve older headers
#
# FOLDER then serves as ONNXRUNTIME_ROOT and in CMAKE_PREFIX_PATH. Run again, it only looks whether the library is still the right one.
set -euo pipefail

PACKAGES="libonnxruntime-dev nlohmann-json3-dev"
SUITES="trixie" # the first of Debian's with libonnxruntime-dev, and the machine's own

fail() {
    echo "dependencies.sh: $*" >&2
    exit 1
}

# Compiles nothing but the search for headers.
has_headers() { printf '#include <%s>\n' "$@" | "${CXX:-c++}" -x c++ -E - >/dev/null 2>&1; }

# An apt of our own beside the machine's: its keys and proxies, another suite, no need to be root.
apt_get() {
    apt-get -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists="$work/lists" \
        -o Dir::Cache="$work/cache" -o Acquire::Languages=none -o Acquire::Retries=3 -o APT::Sandbox::User="$(id -un)" "$@"
}

# fetch SUITE: downloads the packages from the mirror of the machine's own main archive, signed by Debian
fetch() {
    local mirror keys=""
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' 2>/dev/null | head -n 1)
    [ -n "$mirror" ] || fail "apt has no mirror configured; install $PACKAGES, or set ONNXRUNTIME_ROOT"
    for file in /usr/share/keyrings/debian-archive-keyring.{gpg,pgp}; do
        [ ! -e "$file" ] || keys="[signed-by=$file]"
    done
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    echo "deb $keys $mirror $1 main" >"$work/sources.list"
    # shellcheck disable=SC2086 # a list of words
    apt_get update >"$work/log" 2>&1 && (cd "$work" && apt_get download $PACKAGES >>"$work/log" 2>&1)
}

[ $# -eq 1 ] || fail "expected one argument, the folder to put it into"
command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler found (${CXX:-c++}); install g++"
has_headers openssl/evp.h || fail "headers of OpenSSL not found; install libssl-dev"
mkdir -p "$1"
folder=$(cd "$1" && pwd)

if [ ! -e "$folder/include" ]; then
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
        fail "no apt-get or dpkg-deb here; install ONNX Runtime and nlohmann-json, and set ONNXRUNTIME_ROOT"
    work=$(mktemp -d "$folder/fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    own=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    for suite in $SUITES $own; do
        fetch "$suite" && break
    done
    for package in $PACKAGES; do
        file=$(find "$work" -maxdepth 1 -name "${package}_*.deb")
        [ -n "$file" ] || fail "apt could not fetch $package: $(grep -m1 '^E:' "$work/log" || echo "see apt's configuration")"
        dpkg-deb -x "$file" "$work/root"
    done
    mv "$work/root/usr/include" "$folder/include" # last, so that it is there whole or not at all
fi

# Found without importing it: that would load it.
find_capi='import importlib.util as u; print(u.find_spec("onnxruntime").submodule_search_locations[0] + "/capi")'
capi=$("${PYTHON:-python3}" -c "$find_capi" 2>/dev/null) ||
    fail "${PYTHON:-python3} has no onnxruntime; pip install onnxruntime, or set ONNXRUNTIME_ROOT"
library=$(find "$capi" -name 'libonnxruntime.so.*' | head -n 1)
[ -n "$library" ] || fail "$capi has no libonnxruntime.so; its wheel is of another kind"
mkdir -p "$folder/lib"
find "$folder/lib" -name 'libonnxruntime*' -delete
ln -s "$capi"/libonnxruntime*.so* "$folder/lib/"
ln -sf "$library" "$folder/lib/libonnxruntime.so.1" # the name that programs ask for
ln -sf "$library" "$folder/lib/libonnxruntime.so"
echo "headers $folder/include, library $library"
