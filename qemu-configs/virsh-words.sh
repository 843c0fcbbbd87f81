# What a virsh command line says; read in by frozen.sh and virsh-frozen, no program of its own.
#
# virsh_words WORD… (without `virsh` itself) sets
#   virsh_connect  the options that name the connection (an array)
#   virsh_command  virsh's command; empty: none
#   virsh_reads    yes: virsh reads its commands from its input
#   virsh_copies   yes: it copies the VM's memory
#   virsh_domain   its domain: a name, a number or a UUID; empty: it says none
#   virsh_unclear  why which domain it copies cannot be told, empty: it can; virsh_remedy: what to do then
# An option that is not known here may take a value, and then the word after it is no domain: such a line is unclear, unless it has --domain.

# The commands that copy memory, as a pattern.
virsh_copying='save|managedsave|dump|migrate|snapshot-create|snapshot-create-as'
virsh_copying_within="(^|[;[:space:]\"'])($virsh_copying)(\$|[;[:space:]\"'])"

virsh_words() {
    virsh_connect=() virsh_command='' virsh_reads=yes virsh_copies='' virsh_domain='' virsh_unclear='' virsh_remedy=''
    local word cluster value named=()

    # virsh's own options, as getopt_long takes them: clusters of short ones, long ones also by their beginning, values apart or attached.
    while [ $# -gt 0 ]; do
        word=$1
        case $word in
            --) shift && break ;;
            --*=*)
                case $word in
                    --c*=*) virsh_connect=(-c "${word#*=}") ;;
                    --v*=*) virsh_reads='' ;;
                esac
                shift
                ;;
            --c | --co | --con | --conn | --conne | --connec | --connect)
                virsh_connect=(-c "${2-}")
                shift $(($# > 1 ? 2 : 1))
                ;;
            --d* | --e* | --k* | --l*) shift $(($# > 1 ? 2 : 1)) ;;
            --q* | --r* | --t*) shift ;;
            --h* | --v*) shift && virsh_reads='' ;;
            --*) virsh_unclear="virsh's option $word is not known here" && break ;;
            -?*)
                shift
                cluster=${word#-}
                while [ -n "$cluster" ]; do
                    case $cluster in
                        [cdekKl]*)
                            value=${cluster#?}
                            if [ -z "$value" ]; then
                                value=${1-}
                                shift $(($# > 0 ? 1 : 0))
                            fi
                            case $cluster in c*) virsh_connect=(-c "$value") ;; esac
                            break
                            ;;
                        [qrt]*) cluster=${cluster#?} ;;
                        [hvV]*) cluster=${cluster#?} virsh_reads='' ;;
                        *) virsh_unclear="virsh's option $word is not known here" && break 2 ;;
                    esac
                done
                ;;
            *) break ;;
        esac
    done
    if [ -n "$virsh_unclear" ]; then
        virsh_reads='' virsh_remedy="leave that option out"
        for word in "$@"; do
            [[ $word =~ $virsh_copying_within ]] && virsh_copies=yes
        done
        return
    fi

    [ $# = 0 ] && return
    virsh_command=$1 virsh_reads='' virsh_remedy="name it by --domain NAME, each word by itself"
    shift
    # A single word may be a whole script of commands for virsh, with quotes of its own.
    if [ $# = 0 ] && [[ $virsh_command =~ [^a-z0-9-] ]]; then
        if [[ $virsh_command =~ $virsh_copying_within ]]; then
            virsh_copies=yes
            virsh_unclear="the command stands in one word"
        fi
        return
    fi
    [[ $virsh_command =~ ^($virsh_copying)$ ]] && virsh_copies=yes

    while [ $# -gt 0 ]; do
        word=$1
        shift
        case $word in
            --domain)
                named+=("${1-}")
                shift $(($# > 0 ? 1 : 0))
                ;;
            --domain=*) named+=("${word#*=}") ;;
            --help)
                # virsh tells what the command is, and does not run it.
                virsh_copies='' virsh_unclear=''
                return
                ;;
            --)
                [ -n "$virsh_domain" ] || virsh_domain=${1-}
                break
                ;;
            --*=*) ;;
            # They take a value.
            --file | --xml | --format | --image-format | --parallel-channels | --xmlfile | --name | --description | --memspec | --diskspec | \
                --desturi | --migrateuri | --graphicsuri | --listen-address | --dname | --timeout | --migrate-disks | \
                --migrate-disks-detect-zeroes | --disks-port | --disks-uri | --comp-methods | --comp-mt-level | --comp-mt-threads | \
                --comp-mt-dthreads | --comp-xbzrle-cache | --comp-zlib-level | --comp-zstd-level | --auto-converge-initial | \
                --auto-converge-increment | --persistent-xml | --bandwidth | --postcopy-bandwidth | --available-switchover-bandwidth | \
                --parallel-connections | --tls-destination)
                shift $(($# > 0 ? 1 : 0))
                ;;
            # They take none.
            --bypass-cache | --running | --paused | --verbose | --live | --crash | --reset | --memory-only | --offline | --p2p | --direct | \
                --tunnelled | --tunneled | --persistent | --undefinesource | --suspend | --copy-storage-all | --copy-storage-inc | \
                --copy-storage-synchronous-writes | --change-protection | --unsafe | --compressed | --auto-converge | --rdma-pin-all | \
                --abort-on-error | --postcopy | --postcopy-after-precopy | --postcopy-resume | --timeout-suspend | --timeout-postcopy | \
                --tls | --parallel | --zero-copy | --redefine | --redefine-validate | --current | --no-metadata | --halt | --disk-only | \
                --reuse-external | --quiesce | --atomic | --validate | --print-xml) ;;
            --*) [ -n "$virsh_domain$virsh_unclear" ] || virsh_unclear="whether $word takes a value is not known here" ;;
            *) [ -n "$virsh_domain" ] || virsh_domain=$word ;;
        esac
    done
    case ${#named[@]} in
        0) ;;
        1) virsh_domain=${named[0]} virsh_unclear='' ;;
        *) virsh_unclear="it has --domain more than once" ;;
    esac
    if [ -z "$virsh_domain$virsh_unclear" ]; then
        virsh_unclear="it names no domain"
    fi
    [ -n "$virsh_copies" ] || virsh_unclear=''
}

# virsh_is_here WORD…: whether the virsh that these words run (with virsh_connect) speaks to this host's libvirt: vmgmtd freezes the VMs of
# its own host alone. Where it does not, or does not tell, it fails: virsh_unclear says why, virsh_remedy what to do.
virsh_is_here() {
    local uri
    uri=$("$@" uri </dev/null) || uri=
    uri=${uri%%$'\n'*}
    if [ -z "$uri" ]; then
        virsh_unclear="virsh does not tell to which libvirt it speaks" virsh_remedy="see what \`virsh uri\` says"
        return 1
    fi
    # qemu:///system and qemu+unix:///system name no host; +ext runs a program that leads anywhere.
    if [[ $uri =~ ^[^:/]+://[^/?#] || $uri =~ ^[^:/]+\+ext: ]]; then
        virsh_unclear="virsh speaks to another host's libvirt ($uri), and a VM can be frozen only on the host where it runs"
        virsh_remedy="run this on that host, with a connection that names no host (qemu:///system)"
        return 1
    fi
}
