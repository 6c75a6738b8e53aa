#!lua flags=allow-oom
-- include keys.lua
-- include fence_lease.lua
-- ARGV: worker, then pairs of entry id and delivery count. Returns the ids that are lost. JUSTID leaves the delivery count
-- alone: a long generation must not end in the dead letters for being renewed.
local lost = {}
for i = 2, #ARGV, 2 do
  if owns(ARGV[i], ARGV[1], ARGV[i + 1]) then
    redis.call('XCLAIM', K.requests, 'rollout', ARGV[1], 0, ARGV[i], 'JUSTID')
  else
    lost[#lost + 1] = ARGV[i]
  end
end
local now = redis.call('TIME')
redis.call('ZADD', K.workers, string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000)), ARGV[1])
redis.call('PEXPIRE', K.workers, 600000)
return lost
