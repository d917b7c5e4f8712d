"""Compile the hot modules of vmonty with Cython; every other piece of metadata is in pyproject.toml."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The one list of modules that are compiled: pure-Python mode, a .py with a sibling .pxd.
COMPILED = [
    "vmonty.base.hostcall",
    "vmonty.base.ram",
    "vmonty.cpu.startup",
    "vmonty.cpu.state",
    "vmonty.cpu.decode",
    "vmonty.cpu.known",
    "vmonty.cpu.assembler",
    "vmonty.cpu.stubs",
    "vmonty.cpu.codecache",
    "vmonty.cpu.coherence",
    "vmonty.cpu.breakpoints",
    "vmonty.cpu.mmio",
    "vmonty.cpu.paging",
    "vmonty.cpu.vmx_exit",
    "vmonty.cpu.exclusive",
    "vmonty.cpu.careful",
    "vmonty.cpu.tlb",
    "vmonty.cpu.liveness",
    "vmonty.cpu.grouping",
    "vmonty.cpu.operands",
    "vmonty.cpu.exits",
    "vmonty.cpu.stack",
    "vmonty.cpu.strips",
    "vmonty.cpu.stripcode",
    "vmonty.cpu.branches",
    "vmonty.cpu.instructions",
    "vmonty.cpu.translate",
    "vmonty.cpu.ahead",
    "vmonty.cpu.segmentation",
    "vmonty.cpu.strings",
    "vmonty.cpu.hosttraps",
    "vmonty.cpu.fpu",
    "vmonty.cpu.gather",
    "vmonty.cpu.modrm",
    "vmonty.cpu.virtualization",
    "vmonty.cpu.system",
    "vmonty.cpu.resume",
    "vmonty.cpu.dispatch",
    "vmonty.cpu.core",
    "vmonty.cpu.vmx_capabilities",
    "vmonty.cpu.cpuid",
    "vmonty.cpu.msr",
    "vmonty.cpu.information",
    "vmonty.cpu.control",
    "vmonty.cpu.segments",
    "vmonty.cpu.syscalls",
    "vmonty.cpu.tasks",
    "vmonty.cpu.boundary",
    "vmonty.cpu.events",
    "vmonty.cpu.transfers",
    "vmonty.cpu.ports",
    "vmonty.cpu.preemption",
    "vmonty.cpu.vmx_entry",
    "vmonty.cpu.vmx_checks",
    "vmonty.cpu.legacy",
    "vmonty.cpu.vmx",
    "vmonty.cpu.svm_exit",
    "vmonty.cpu.vmx_code",
    "vmonty.cpu.svm_entry",
    "vmonty.cpu.svm_code",
    "vmonty.cpu.svm",
    "vmonty.cpu.inspection",
    "vmonty.cpu.context",
    "vmonty.cpu.observe",
    "vmonty.kvm.soft.msr_table",
    "vmonty.kvm.soft.seats",
    "vmonty.kvm.soft.vcpu_arch",
    "vmonty.kvm.soft.lapic_irq",
    "vmonty.kvm.soft.lapic_regs",
    "vmonty.kvm.soft.vcpu_cpuid",
    "vmonty.kvm.soft.fastpath",
    "vmonty.kvm.soft.port_window",
    "vmonty.kvm.soft.doorbells",
    "vmonty.kvm.soft.plain_moves",
    "vmonty.kvm.soft.xapic",
    "vmonty.kvm.soft.fast_mmio",
    "vmonty.kvm.soft.vmx.run",
    "vmonty.kvm.soft.svm.run",
    "vmonty.kvm.soft.reentry",
    "vmonty.vmm.virtio.queue",
    "vmonty.vmm.hw.vga.raster",
    "vmonty.vmm.display.frame",
    "vmonty.vmm.display.vnc.pixels",
]

# Called while the guest's vector state is live in the host's registers: no vector register, and no loop
# turned into a call of libc's memset or memcpy.
GENERAL_REGS_ONLY = {
    "vmonty.cpu.segmentation",
    "vmonty.cpu.decode",
    "vmonty.cpu.known",
    "vmonty.cpu.assembler",
    "vmonty.cpu.stubs",
    "vmonty.cpu.codecache",
    "vmonty.cpu.coherence",
    "vmonty.cpu.liveness",
    "vmonty.cpu.grouping",
    "vmonty.cpu.operands",
    "vmonty.cpu.exits",
    "vmonty.cpu.stack",
    "vmonty.cpu.strips",
    "vmonty.cpu.stripcode",
    "vmonty.cpu.branches",
    "vmonty.cpu.instructions",
    "vmonty.cpu.translate",
    "vmonty.cpu.ahead",
    "vmonty.cpu.startup",
    "vmonty.cpu.state",
    "vmonty.cpu.exclusive",
    "vmonty.cpu.careful",
    "vmonty.cpu.tlb",
    "vmonty.cpu.breakpoints",
    "vmonty.cpu.mmio",
    "vmonty.cpu.paging",
    "vmonty.cpu.resume",
    "vmonty.cpu.dispatch",
    "vmonty.cpu.modrm",
    "vmonty.cpu.virtualization",
    "vmonty.cpu.system",
    "vmonty.cpu.segments",
    "vmonty.cpu.boundary",
    "vmonty.cpu.events",
    "vmonty.cpu.msr",
    "vmonty.cpu.cpuid",
    "vmonty.cpu.strings",
    "vmonty.cpu.fpu",
    "vmonty.cpu.gather",
    "vmonty.cpu.hosttraps",
    "vmonty.cpu.vmx_exit",
    "vmonty.cpu.preemption",
    "vmonty.cpu.vmx_entry",
    "vmonty.cpu.information",
    "vmonty.cpu.control",
    "vmonty.cpu.syscalls",
    "vmonty.cpu.transfers",
    "vmonty.cpu.tasks",
    "vmonty.cpu.ports",
    "vmonty.cpu.svm_exit",
    "vmonty.cpu.vmx_code",
    "vmonty.cpu.svm_entry",
    "vmonty.cpu.svm_code",
    "vmonty.cpu.vmx_capabilities",
    "vmonty.cpu.vmx_checks",
    "vmonty.cpu.legacy",
    # These handle exits for which the guest's vector state stays where it is (run_cpu, put_vectors).
    "vmonty.cpu.vmx",
    "vmonty.cpu.svm",
    "vmonty.kvm.soft.fastpath",
    "vmonty.kvm.soft.lapic_irq",
    "vmonty.kvm.soft.msr_table",
    "vmonty.kvm.soft.vcpu_cpuid",
    "vmonty.kvm.soft.vmx.run",
    "vmonty.kvm.soft.svm.run",
}
GENERAL_REGS_ARGS = [
    "-mgeneral-regs-only",
    "-fno-tree-loop-distribute-patterns",
    # Skylake to Cascade Lake decode a jump anew each time that crosses or ends at such a border: 2 % of translation.
    "-Wa,-mbranches-within-32B-boundaries",
]

# -z now: translated guest code may call compiled functions, and a lazily bound call would go through
# the dynamic linker, which uses vector registers that belong to the guest.
LINK_ARGS = ["-Wl,-z,now"]
# The others may use them: loops over pixels and bytes do.
VECTOR_ARGS = ["-O3"]
COMPILE_ARGS = ["-O2", "-fno-strict-aliasing", "-Wno-unused-function"]


def missing_tools() -> list[str]:
    """Name what a compile needs and this host lacks, with the package that brings it."""
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    missing = []
    if shutil.which(compiler) is None and shutil.which("gcc") is None:
        missing.append(f"a C compiler ({compiler!r} not found; on Debian or Ubuntu: apt-get install gcc libc6-dev)")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        missing.append(f"the Python headers ({header} not found; on Debian or Ubuntu: apt-get install python3-dev)")
    try:
        import Cython  # noqa: F401
    except ImportError:
        missing.append("Cython (pip install 'Cython>=3.1')")
    return missing


class BuildExt(build_ext):
    """Fail early and say what is missing: there is no silent fall-back to slow code."""

    def run(self) -> None:
        if missing := missing_tools():
            raise SystemExit("vmonty cannot be built; it needs " + " and ".join(missing))
        from Cython.Build import cythonize

        self.extensions = cythonize(
            self.extensions,
            build_dir="build/cython",
            nthreads=os.cpu_count() or 1,
            include_path=["src"],
            compiler_directives={
                "language_level": 3,
                "embedsignature": True,
                "freethreading_compatible": False,
                "annotation_typing": True,
            },
        )
        for extension in self.extensions:
            extension._needs_stub = False
        self.parallel = os.cpu_count()
        super().run()
        self.precompute()

    def precompute(self) -> None:
        """Do once what every start would do: make the decoder's tables, and compile to bytecode."""
        # In a process of its own: what this one imported of the package may be older than its sources.
        package = Path("src" if self.inplace else self.build_lib, "vmonty")
        store = "import sys, pathlib; from vmonty.cpu import opcodes; opcodes.store(pathlib.Path(sys.argv[1]))"
        environment = {**os.environ, "PYTHONPATH": str(Path("src").absolute())}
        subprocess.run([sys.executable, "-c", store, str(package / "cpu")], env=environment, check=True)
        if self.inplace:
            # Python itself leaves bytecode behind only where it may, and where nobody forbids it to.
            compileall.compile_dir(package, quiet=1)


def extension(name: str) -> Extension:
    return Extension(
        name,
        [f"src/{name.replace('.', '/')}.py"],
        extra_compile_args=COMPILE_ARGS + (GENERAL_REGS_ARGS if name in GENERAL_REGS_ONLY else VECTOR_ARGS),
        extra_link_args=LINK_ARGS,
    )


setup(ext_modules=[extension(name) for name in COMPILED], cmdclass={"build_ext": BuildExt})
