#%Module1.0
# Module of pipedream-hpc for Environment Modules. @PREFIX@: its virtual environment; @VERSION@: its version.
# README.md in this folder shows how to fill it in and install it.

module-whatis "Name: pipedream-hpc"
module-whatis "Version: @VERSION@"
module-whatis "Description: PipeDream as an MPI runtime: pipeline-parallel training with 1F1B and weight stashing"

proc ModulesHelp { } {
    puts stderr "Provides the command pipedream, and a Python with the package pipedream_hpc."
    puts stderr "Start with: pipedream --help"
}

conflict pipedream-hpc
# The MPI it was built with; omit this if the virtual environment contains an MPI.
# prereq openmpi

setenv PIPEDREAM_HPC_ROOT {@PREFIX@}
prepend-path PATH {@PREFIX@/bin}
