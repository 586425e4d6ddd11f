"""What csrc/cpu's threads do with an exception: it reaches the caller, from whichever thread, and the threads go on."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = r"""
#include <cstdio>
#include <stdexcept>
#include <string>

#include "simd.h"

using namespace fastppo;

// What a loop over 4 threads says whose item `bad` throws; how many items ran where none does.
std::string loop(int64_t bad) {
  std::atomic<int> ran{0};
  try {
    parallel_for(4, 1 << 20, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i == bad) throw std::runtime_error("item " + std::to_string(i));
        ++ran;
      }
    });
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "ran " + std::to_string(ran);
}

int main() {
  omp_set_num_threads(4);
  for (int64_t bad : {0, 3, -1}) std::printf("%s\n", loop(bad).c_str());
  with_team([] {
    for (int64_t bad : {0, 3, -1}) std::printf("team: %s\n", loop(bad).c_str());
  });
  try {
    with_team([] { parallel_for(4, 1 << 20, [](int64_t begin, int64_t) { if (begin) throw std::runtime_error("out of the team"); }); });
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the program with")
def test_an_exception_on_any_thread_reaches_the_caller(tmp_path):
    (tmp_path / "main.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-fopenmp", "-Wno-psabi", f"-I{ROOT / 'csrc/cpu'}"]
    subprocess.run(["g++", *flags, str(tmp_path / "main.cpp"), "-o", str(tmp_path / "program")], check=True)
    ran = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True, timeout=60)
    three = ["item 0", "item 3", "ran 4"]
    assert ran.stdout.splitlines() == [*three, *(f"team: {x}" for x in three), "out of the team"], ran
