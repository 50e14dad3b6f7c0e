# Sourced by ops/package and ops/reproducible: the release build, which is the same wherever it is made.

# Builds both programs of the last commit in the folder $1, which is made; they are sluiced and sluice-train in
# $1/target/release.
#
# The folders of this machine, which compilers write into panic messages and assertions, are replaced by fixed names.
build_release() {
  local folder cargo_home
  mkdir -p "$1/source"
  folder=$(realpath "$1")
  cargo_home=${CARGO_HOME:-$HOME/.cargo}
  git archive HEAD | tar --extract --directory "$folder/source"
  (
    cd "$folder/source"
    # What a user's environment adds would not be in the next build.
    unset CARGO_ENCODED_RUSTFLAGS CXXFLAGS LDFLAGS
    export RUSTFLAGS="--remap-path-prefix=$folder=/build --remap-path-prefix=$cargo_home=/cargo"
    export CFLAGS="-ffile-prefix-map=$folder=/build -ffile-prefix-map=$cargo_home=/cargo"
    export SOURCE_DATE_EPOCH=0 CARGO_TARGET_DIR=$folder/target
    cargo build --release --locked --package sluice-daemon --bin sluiced --package sluice-trainer --bin sluice-train \
      --features sluice-daemon/tls,sluice-trainer/tls
  ) >&2
}
