-- Nothing is done for a trainer that no longer holds the job (ARGV[2]: its owner token), nor in a Redis that came back
-- empty since it took the job (ARGV[1]: the epoch that it saw then).
if redis.call('GET', K.epoch) ~= ARGV[1] then return {'epoch'} end
do
  local holder = redis.call('GET', K.trainer)
  if holder ~= ARGV[2] then return {'lost', holder or ''} end
end
