#!lua flags=allow-oom
-- include keys.lua
-- include fence_lease.lua
-- ARGV: worker, entry id, delivery count, dedupe key, DeadLetter. Moves as many bytes as it frees, hence allow-oom.
if not owns(ARGV[2], ARGV[1], ARGV[3]) then
  -- Gone: buried by this very call, whose reply was lost, or finished by whoever took it over.
  if #redis.call('XRANGE', K.requests, ARGV[2], ARGV[2]) == 0 then return {'ok'} end
  return {'lost'}
end
redis.call('XADD', K.dead, '*', 'key', ARGV[4], 'letter', ARGV[5])
redis.call('XACK', K.requests, 'rollout', ARGV[2])
redis.call('XDEL', K.requests, ARGV[2])
return {'ok'}
