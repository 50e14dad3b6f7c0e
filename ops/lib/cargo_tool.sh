# Sourced: tools of cargo, each in the cache in its pinned version.

# Prints the folder with the program of $1 (a crate that installs a program of its name) in version $2.
cargo_tool() {
  local root="${SLUICE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sluice}/$1-$2"
  [ -x "$root/bin/$1" ] || cargo install --quiet --locked --version "$2" --root "$root" "$1" >&2
  echo "$root/bin"
}
