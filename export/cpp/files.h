/// Writing files so that nothing half-written ever stands under its final name.
#pragma once

#include <filesystem>
#include <string>

#include "error.h"

/// That a file cannot be written, and why.
UserError unwritable(const std::filesystem::path& path, const std::string& reason);

/// A hidden sibling to write a file to; it vanishes unless it is published.
class WrittenAside {
 public:
  /// @throws UserError the file's folder cannot be made.
  explicit WrittenAside(const std::filesystem::path& path);
  ~WrittenAside();
  WrittenAside(const WrittenAside&) = delete;
  WrittenAside& operator=(const WrittenAside&) = delete;

  const std::filesystem::path& aside() const { return aside_; }

  /// Flushes the file to the disk and gives it its name, replacing what has that name.
  /// @throws UserError it was not written, or cannot get its name.
  void publish();

 private:
  std::filesystem::path path_, aside_;
};
