/// NumPy's .npy files in C order: int16 in, any type out.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

struct HuArray {
  std::vector<int64_t> shape;  // of any rank, no length 0
  std::vector<int16_t> values;
};

/// Reads little-endian int16 values.
/// @throws UserError no such file, not .npy, another type or order, or not as long as its header says.
HuArray read_npy(const std::filesystem::path& path);

/// Writes an array; the file has its name once it is whole.
/// @param type NumPy's word for one value, such as "|u1".
/// @throws UserError the file cannot be written.
void write_npy(const std::filesystem::path& path, const std::string& type, std::span<const int64_t> shape,
               std::span<const char> bytes);
