# Defines `container_options FOLDER...`, which makes the array `container`: srun's options for a step
# in a container (enroot and pyxis), none without CONTAINER_IMAGE.
#
# Mounts the working folder (the repository), the FOLDERs that lie elsewhere (behind a link, on
# another file system), and CONTAINER_MOUNTS, the first two under their own paths.
container_options() {
    local mounts=$PWD:$PWD folder
    container=()
    [ -n "${CONTAINER_IMAGE:-}" ] || return 0
    for folder in "$@"; do
        folder=$(realpath "$folder")
        case $folder/ in
            "$PWD"/*) ;;
            *) mounts+=,$folder:$folder ;;
        esac
    done
    container=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD"
        --container-mounts="$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
}
