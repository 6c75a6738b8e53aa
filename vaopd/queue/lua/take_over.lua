#!lua flags=allow-oom
-- include keys.lua
-- include fields.lua
-- Takes requests whose lease ran out, oldest first. ARGV: worker, lease in ms, count, deliveries that make an entry suspect,
-- and 1 if the worker is idle, so that it may take a suspect: one, and nothing beside it. XCLAIM raises the delivery count,
-- and drops entries that were deleted meanwhile.
local taken, suspect_after, idle = {}, tonumber(ARGV[4]), ARGV[5] == '1'
for _, pending in ipairs(redis.call('XPENDING', K.requests, 'rollout', 'IDLE', ARGV[2], '-', '+', ARGV[3])) do
  local is_suspect = pending[4] >= suspect_after
  if not is_suspect or (idle and #taken == 0) then
    local claimed = redis.call('XCLAIM', K.requests, 'rollout', ARGV[1], ARGV[2], pending[1])[1]
    if claimed then
      taken[#taken + 1] = {claimed[1], pending[4] + 1, key_and_body(claimed[2])}
      if is_suspect then break end
    end
  end
end
return taken
