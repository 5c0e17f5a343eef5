-- Module of pipedream-hpc for Lmod. @PREFIX@: its virtual environment; @VERSION@: its version.
-- README.md in this folder shows how to fill it in and install it.

whatis("Name: pipedream-hpc")
whatis("Version: @VERSION@")
whatis("Description: PipeDream as an MPI runtime: pipeline-parallel training with 1F1B and weight stashing")

help([[
Provides the command pipedream, and a Python with the package pipedream_hpc.
Start with: pipedream --help
]])

conflict("pipedream-hpc")
-- The MPI it was built with; omit this if the virtual environment contains an MPI.
-- depends_on("openmpi")

setenv("PIPEDREAM_HPC_ROOT", "@PREFIX@")
prepend_path("PATH", "@PREFIX@/bin")
