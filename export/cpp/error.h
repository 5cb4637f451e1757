#pragma once

#include <stdexcept>

/// A mistake that the user can mend, in one line: `<what>: got <value>; <rule>; <remedy>`.
struct UserError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
