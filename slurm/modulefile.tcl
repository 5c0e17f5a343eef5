#%Module1.0
# Module of pipedream-hpc for Environment Modules. @PREFIX@: the virtual environment that holds it; @VERSION@: its
# version. Filled in and installed as README.md beside this file says.

module-whatis "Name: pipedream-hpc"
module-whatis "Version: @VERSION@"
module-whatis "Description: PipeDream as an MPI runtime: pipeline-parallel training with 1F1B and weight stashing"

proc ModulesHelp { } {
    puts stderr "Gives the command pipedream, and the Python whose programs can import pipedream_hpc."
    puts stderr "Start with: pipedream --help"
}

conflict pipedream-hpc
# The MPI it was built with; leave this out if the environment has one of its own.
# prereq openmpi

setenv PIPEDREAM_HPC_ROOT {@PREFIX@}
prepend-path PATH {@PREFIX@/bin}
