/// fuzz_volumes: reads volumes that a test damaged, and writes a mask for each that is read; one process for thousands of them.

#include <ATen/ops/zeros_like.h>

#include <iostream>

#include "volume.h"

int main(int, char** argv) {
  for (char** path = argv + 1; *path; ++path) {
    try {
      const Volume volume = read_volume(*path);
      const std::filesystem::path file(*path);
      write_mask(file.parent_path() / ("mask-" + file.filename().string()), at::zeros_like(volume.hu_ZYX, at::kByte), volume);
      std::cout << "read" << std::endl;
    } catch (const std::exception& error) {
      std::cout << "refused " << error.what() << std::endl;
    }
  }
}
