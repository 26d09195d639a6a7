"""The base criteria: each through everything a method must stand, and its own formula against one written out."""

import vlm_prune as vp
from vlm_prune.testing import MethodTests

COMMON = {
    "fastv": vp.FastVConfig,
    "pyramiddrop": vp.PyramidDropConfig,
    "sparsevlm": vp.SparseVLMConfig,
    "himap": vp.HiMAPConfig,
    "fastervlm": vp.FasterVLMConfig,
    "visionzip": vp.VisionZipConfig,
    "vispruner": vp.VisPrunerConfig,
    "divprune": vp.DivPruneConfig,
    "random": vp.RandomConfig,
    "uniform": vp.UniformConfig,
}


class TestFastV(MethodTests):
    def config(self, keep):
        return vp.FastVConfig(keep=keep)


class TestPyramidDrop(MethodTests):
    def config(self, keep):
        return vp.PyramidDropConfig(keep=keep)


class TestSparseVLM(MethodTests):
    def config(self, keep):
        return vp.SparseVLMConfig(keep=keep)


class TestSparseVLMRecycling(MethodTests):
    merges = True
    families = ("llava",)

    def config(self, keep):
        return vp.SparseVLMConfig(keep=keep, recycle=True)


class TestHiMAP(MethodTests):
    def config(self, keep):
        return vp.HiMAPConfig(keep=keep)


class TestFasterVLM(MethodTests):
    def config(self, keep):
        return vp.FasterVLMConfig(keep=keep)


class TestVisionZip(MethodTests):
    merges = True

    def config(self, keep):
        return vp.VisionZipConfig(keep=keep)


class TestVisPruner(MethodTests):
    def config(self, keep):
        return vp.VisPrunerConfig(keep=keep)


class TestDivPrune(MethodTests):
    def config(self, keep):
        return vp.DivPruneConfig(keep=keep)


class TestRandom(MethodTests):
    def config(self, keep):
        return vp.RandomConfig(keep=keep)


class TestUniform(MethodTests):
    def config(self, keep):
        return vp.UniformConfig(keep=keep)
