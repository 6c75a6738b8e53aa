#!lua flags=allow-oom
-- include keys.lua
-- include fields.lua
-- Takes requests whose lease ran out, oldest first. ARGV: worker, lease in ms, count. XCLAIM raises the delivery count, and
-- drops entries that were deleted meanwhile.
local taken = {}
for _, pending in ipairs(redis.call('XPENDING', K.requests, 'rollout', 'IDLE', ARGV[2], '-', '+', ARGV[3])) do
  local claimed = redis.call('XCLAIM', K.requests, 'rollout', ARGV[1], ARGV[2], pending[1])[1]
  if claimed then taken[#taken + 1] = {claimed[1], pending[4] + 1, key_and_body(claimed[2])} end
end
return taken
