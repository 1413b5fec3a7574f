"""`mllama completion`: the lines that teach a shell to complete command lines of `mllama`."""

from __future__ import annotations

import click

from .terminal import echo

# Each script starts `mllama` with _MLLAMA_COMPLETE=SHELL and the words before the cursor; see `completing`.
SCRIPTS = {
    "bash": """\
# Completion of mllama for bash.
_mllama() {
    local kind value help files= name
    COMPREPLY=()
    while IFS=$'\\t' read -r kind value help; do
        case $kind in
            word) COMPREPLY+=("$value") ;;
            open) COMPREPLY+=("$value"); compopt -o nospace 2> /dev/null ;;
            files) files=-f ;;
            folders) files=-d ;;
        esac
    done < <(_MLLAMA_COMPLETE=bash _MLLAMA_BREAKS=$COMP_WORDBREAKS \\
        "$1" "${COMP_LINE:0:COMP_POINT}" 2> /dev/null)
    [ -n "$files" ] || return 0
    while IFS= read -r name; do
        COMPREPLY+=("$name")
        compopt -o filenames 2> /dev/null
    done < <(compgen $files -- "$2")
}
complete -o nosort -F _mllama mllama 2> /dev/null || complete -F _mllama mllama
""",
    "zsh": """\
#compdef mllama
# Completion of mllama for zsh.
_mllama() {
    local kind value help files
    local -a words_only described opened
    while IFS=$'\\t' read -r kind value help; do
        case $kind in
            (word)
                if [[ -n $help ]]; then
                    described+=("${value//:/\\\\:}:$help")
                else
                    words_only+=("$value")
                fi ;;
            (open) opened+=("$value") ;;
            (files|folders) files=$kind ;;
        esac
    done < <(_MLLAMA_COMPLETE=zsh "$words[1]" "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2> /dev/null)
    [[ $PREFIX = -*=* ]] && compset -P '*='
    (( $#words_only )) && compadd -V mllama -a words_only
    (( $#opened )) && compadd -V mllama -S '' -a opened
    (( $#described )) && _describe -V mllama described
    [[ $files = files ]] && _files
    [[ $files = folders ]] && _files -/
    return 0
}
if [[ $funcstack[1] = _mllama ]]; then _mllama "$@"; else compdef _mllama mllama; fi
""",
    "fish": """\
# Completion of mllama for fish.
function __mllama_complete
    set -l before (commandline -opc)
    set -l word (commandline -ct)
    for line in (env _MLLAMA_COMPLETE=fish $before[1] $before[2..-1] "$word" 2> /dev/null)
        set -l parts (string split -m 2 \\t -- $line)
        switch $parts[1]
            case word open
                printf '%s\\t%s\\n' $parts[2] $parts[3]
            case files
                __fish_complete_path "$word"
            case folders
                __fish_complete_directories "$word" ''
        end
    end
end
complete -c mllama -f -a '(__mllama_complete)'
""",
}


@click.command(
    "completion",
    epilog="\b\nExamples:\n"
    "  mllama completion bash > ~/.local/share/bash-completion/completions/mllama\n"
    "  mllama completion zsh > ~/.zfunc/_mllama   # with fpath+=~/.zfunc before compinit in ~/.zshrc\n"
    "  mllama completion fish > ~/.config/fish/completions/mllama.fish",
)
@click.argument("shell", metavar="bash|zsh|fish", type=click.Choice(list(SCRIPTS)))
def completion_command(shell: str) -> None:
    """Print the script by which a shell completes commands, options, names of models and devices, and files.

    For one line in ~/.bashrc: source <(mllama completion bash). In ~/.zshrc, after compinit: source <(mllama
    completion zsh). In ~/.config/fish/config.fish: mllama completion fish | source.
    """
    echo(SCRIPTS[shell], nl=False)
