"""What `import distseg` offers to notebooks and other programs, besides the commands as functions (distseg/commands/)."""
