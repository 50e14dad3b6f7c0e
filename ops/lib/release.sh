# Sourced by ops/package and ops/reproducible: the release build, which is the same wherever it is made.

# Builds the daemon of the last commit in the folder $1, which is made; the program is $1/target/release/sluiced.
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
    cargo build --release --locked --package sluice-daemon --bin sluiced --features tls
  ) >&2
}
